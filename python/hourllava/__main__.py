# SPDX-License-Identifier: Apache-2.0
"""`python -m hourllava` is the `hourllava` command."""

import sys

from hourllava.cli import main

sys.exit(main())
