"""The name of the method in PEFT's own enumeration of methods.

PEFT (0.21) refuses names that are not members of `PeftType` and has no entry point to add one; transformers uses
``peft_type.value``, so a plain string would not do. The member is added once, in the way `enum` itself stores members.
"""

from peft import PeftType

NAME = "MOA"


def _member() -> PeftType:
    if NAME in PeftType.__members__:
        return PeftType[NAME]
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    return member


MOA: PeftType = _member()
