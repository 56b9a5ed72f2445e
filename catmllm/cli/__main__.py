"""`python -m catmllm.cli`, where the command is not installed."""

import sys

from catmllm.cli.main import main

sys.exit(main())
