"""Entry point of ``python -m selfsup_xbn``, which is equivalent to ``selfsup-xbn``."""

import sys

from selfsup_xbn.cli import main

if __name__ == "__main__":
    sys.exit(main())
