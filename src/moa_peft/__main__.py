"""`python -m moa_peft`, for launchers such as torchrun that start a module."""

import sys

from moa_peft.cli import main

sys.exit(main())
