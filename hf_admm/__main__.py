"""`python -m hf_admm` is `hf-admm`."""

import sys

from hf_admm.cli import main


sys.exit(main())
