"""Puts the trap suite on the path: it is a package of its own that knows nothing of sharpscope."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
