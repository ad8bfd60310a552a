"""`python -m onecopy.cli`."""

import sys

from onecopy.cli import main

sys.exit(main())
