"""``python -m selfsup_xbn``: the same as ``selfsup-xbn``."""

import sys

from selfsup_xbn.cli import main

if __name__ == "__main__":
    sys.exit(main())
