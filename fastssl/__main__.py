"""`python -m fastssl` is `fastssl`; torchrun starts it this way: `torchrun -m fastssl pretrain ...`."""

import sys

from fastssl.cli import main

sys.exit(main())
