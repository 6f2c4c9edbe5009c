"""What a mixture of adapters costs: time, memory and operations beside the frozen base model and PEFT LoRA.

``python -m benchmarks --list`` names the benchmarks and the contenders; each benchmark is one module here, whose
docstring says what it measures, what it is compared with, and how.
"""
