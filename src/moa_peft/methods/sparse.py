"""Mixtures of LoRA experts per linear layer, or per MLP, in which a token keeps some of the experts."""

from typing import Any

from moa_peft.config import MoAConfig
from moa_peft.methods.experts import ATTENTION, MLP, MOA_TARGETS, lora_experts, losses, mixture
from moa_peft.methods.registry import Layers, Numbers, Targets, method

ALL = (*ATTENTION, *MLP)


@method(
    "out = W x + s sum_{i in top k} w_i B_i A_i x,  w = p / sum_{top k} p,  p = softmax(G x + g)",
    "arXiv 1701.06538",
    "module",
)
def moe_lora_topk(
    *,
    num_experts: Numbers = 8,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    targets: Targets = MOA_TARGETS,
    layers: Layers = None,
    top_k: int = 2,
    noise: bool = False,
    balance_coefficient: float = 0.0,
    **config: Any,
) -> MoAConfig:
    """MoE-LoRA: the `top_k` most probable of `num_experts` LoRA experts per linear layer, renormalised.

    The defaults are those of MoA's comparison, whose final runs have neither noise nor a balance loss; they also tried
    coefficients of 1e-4, 1e-3 and 1e-2. The balance loss is Switch's, summed over layers; unlike in the released code
    padding does not count.
    """
    experts = lora_experts(
        targets, num=num_experts, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, layers=layers
    )
    router = {"type": "top_k", "k": top_k, "noise": noise, "bias": True}
    balance = {"type": "balance", "coefficient": balance_coefficient, "reduction": "sum"}
    return mixture(experts, router, config, scope="module", losses=losses(balance))


@method(
    "out = W x + s sum_i w_i B_i A_i x,  w = a / sum a,  a = relu(p - tau(x)),  p = softmax(G x + g)",
    "arXiv 2405.00361",
    "module",
)
def adamole(
    *,
    num_experts: Numbers = 8,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    targets: Targets = MOA_TARGETS,
    layers: Layers = None,
    max_threshold: float | None = None,
    bias: bool = True,
    balance_coefficient: float = 0.0,
    **config: Any,
) -> MoAConfig:
    """AdaMoLE: experts whose probability exceeds a learned threshold, between 0 and `max_threshold` (None: 1/E).

    The defaults are those of MoA's comparison, whose router has a bias and which has no balance loss. The paper's own
    run has 8 experts of rank 4, alpha 16 and dropout 0.05 on q, k, v and o, a router without bias and a balance loss
    of 1e-3: `recipes/originals/adamole.yaml`. Its balance loss multiplies the load by `p - tau`, which can be
    negative; here it is the probability p, and `losses: [{type: balance, importance: above_threshold, ...}]` is
    theirs.
    """
    experts = lora_experts(
        targets, num=num_experts, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, layers=layers
    )
    router = {"type": "adamole", "max_threshold": max_threshold, "bias": bias}
    balance = {"type": "balance", "coefficient": balance_coefficient, "reduction": "sum"}
    return mixture(experts, router, config, scope="module", losses=losses(balance))


@method(
    "out = W x + s sum_{i in top k of E_l} w_i B_i A_i x,  w = p / sum_{top k} p,  p = softmax(G x),  "
    "E_l = 2, 4, 6, 8 for blocks l of the first to the last quarter",
    "arXiv 2402.08562",
    "module",
)
def mola(
    *,
    num_experts: Numbers = (2, 4, 6, 8),
    rank: int = 8,
    alpha: float | None = 16.0,
    dropout: float = 0.05,
    rslora: bool = False,
    targets: Targets = ALL,
    layers: Layers = None,
    top_k: int = 2,
    balance_coefficient: float = 0.0,
    **config: Any,
) -> MoAConfig:
    """MoLA: MoE-LoRA on all linear layers with a number of experts per group of blocks, more in higher blocks.

    `num_experts` is one number per group of consecutive blocks (the paper's shapes: 2468, 5555, 8642, 8228). The
    released training leaves its optional balance loss (coefficient 1e-3) off; `balance_coefficient` adds it with the
    load divided by all assignments, as there.
    """
    experts = lora_experts(
        targets, num=num_experts, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, layers=layers
    )
    router = {"type": "top_k", "k": top_k, "bias": False}
    balance = {"type": "balance", "coefficient": balance_coefficient, "reduction": "sum", "normalised": True}
    return mixture(experts, router, config, scope="module", losses=losses(balance))


@method(
    "out = sum_{i in top k} w_i MLP_i(x), MLP_i with its own LoRA on gate, up and down; LoRA on attention",
    "arXiv 2404.15159",
    "mlp",
)
def mixlora(
    *,
    num_experts: Numbers = 8,
    rank: int = 16,
    alpha: float | None = 32.0,
    dropout: float = 0.05,
    rslora: bool = False,
    targets: Targets = ATTENTION,
    layers: Layers = None,
    top_k: int = 2,
    balance_coefficient: float = 0.01,
    **config: Any,
) -> MoAConfig:
    """MixLoRA: an expert is the frozen MLP with its own LoRA on gate, up and down; a router per MLP keeps `top_k`.

    The frozen gate and up products are made once for all experts. `targets` are the attention layers with an ordinary
    LoRA of weight 1. The balance loss is that of each router, averaged over blocks; the reference takes the load and
    the probabilities of all blocks together, which is also least when one block makes up for another. Families whose
    MLP has no separate gate and up projections are refused. The paper's other routings, in which the weights do not
    sum to 1 and the frozen MLP here keeps the rest, ``(1 - sum w) MLP(x)``:
    `router: {type: top_p, p: 0.8, init_std: 0.02}`, and
    `router: {type: top_k, k: 1, renormalise: false, init_std: 0.02}` with
    `losses: [{type: balance, coefficient: 0.01}, {type: z, coefficient: 0.001}]` (Switch, without a capacity, so that
    no token is dropped).
    """
    lora: dict[str, Any] = {"rank": rank, "alpha": alpha, "dropout": dropout, "rslora": rslora, "layers": layers}
    experts = lora_experts(targets, routed=False, **lora)
    experts.append({"type": "mlp_lora", "num": num_experts} | lora)
    router = {"type": "top_k", "k": top_k, "bias": False, "init_std": 0.02}
    balance = {"type": "balance", "coefficient": balance_coefficient, "reduction": "mean"}
    return mixture(experts, router, config, scope="mlp", losses=losses(balance))


@method(
    "out = W x + s sum_i p_i 1[in top p, or in top k, or H(p) > h] B_i A_i x,  p = softmax(G x)",
    "arXiv 2504.00661",
    "module",
)
def dynmole(
    *,
    num_experts: Numbers = 6,
    rank: int = 24,
    alpha: float | None = 48.0,
    dropout: float = 0.05,
    rslora: bool = False,
    targets: Targets = MLP,
    layers: Layers = None,
    top_p: float = 0.75,
    keep_top_k: int = 2,
    entropy_threshold: float = 0.9,
    entropy_index: float = 1.1,
    entropy_coefficient: float = 1e-2,
    balance_coefficient: float = 1e-3,
    **config: Any,
) -> MoAConfig:
    """DynMoLE: few experts where the router is sure, all of them where its normalised Tsallis entropy H is high.

    Two losses: the entropy (index `entropy_index`), and the balance of the routing weights. Both are means over
    routers. The reference counts padding in the entropy and adds 1e-5 to p, which can make H negative; here padding
    does not count, and H lies in [0, 1] without that. It also joins the tokens of all routers before it multiplies
    load and probability; here the balance is that of each router.
    """
    experts = lora_experts(
        targets, num=num_experts, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, layers=layers
    )
    router = {
        "type": "dynmole",
        "top_p": top_p,
        "keep_top_k": keep_top_k,
        "entropy_threshold": entropy_threshold,
        "entropy_index": entropy_index,
        "bias": False,
    }
    entropy = {"type": "entropy", "coefficient": entropy_coefficient, "q": entropy_index, "reduction": "mean"}
    balance = {"type": "balance", "coefficient": balance_coefficient, "load": "weights", "reduction": "mean"}
    return mixture(experts, router, config, scope="module", losses=losses(entropy, balance))


@method(
    "out = W x + s sum_i w_i B_i A_i x,  w = sparsegen(G x, lambda(x)) >= 0,  sum w = 1",
    "arXiv 2509.25684",
    "module",
)
def ld_mole(
    *,
    num_experts: Numbers = 8,
    rank: int = 8,
    alpha: float | None = 16.0,
    dropout: float = 0.1,
    rslora: bool = False,
    targets: Targets = ALL,
    layers: Layers = None,
    hidden: int = 256,
    epsilon: float = 1e-2,
    balance_coefficient: float = 1.0,
    sparsity_coefficient: float = 0.0,
    sparsity_k: int = 2,
    **config: Any,
) -> MoAConfig:
    """LD-MoLE: a projection onto the simplex with a predicted sparsity lambda decides how many experts take part.

    lambda comes from a network of inner width `hidden` that all layers of the same input width share. The released
    run script has a balance loss of 1.0, with the load divided by all assignments, and the sparsity loss (at most
    `sparsity_k` experts) switched off; `sparsity_coefficient` switches it on. Both are means over layers, and padding
    counts in neither (in the reference it does in the second).
    """
    experts = lora_experts(
        targets, num=num_experts, rank=rank, alpha=alpha, dropout=dropout, rslora=rslora, layers=layers
    )
    router = {"type": "sparsegen", "hidden": hidden, "epsilon": epsilon, "bias": False}
    balance = {"type": "balance", "coefficient": balance_coefficient, "normalised": True, "reduction": "mean"}
    sparsity = {"type": "sparsity", "coefficient": sparsity_coefficient, "k": sparsity_k, "reduction": "mean"}
    return mixture(experts, router, config, scope="module", losses=losses(balance, sparsity))
