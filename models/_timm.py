"""Imports timm without wandb, which timm's summary writer would otherwise import whenever it is installed.

`logger=none` promises that wandb is not imported: importing it takes seconds. Imported first
by `models/__init__.py`; of timm only that writer, which nobody uses here, notices.
"""

from __future__ import annotations

import sys

if "wandb" not in sys.modules:
    sys.modules["wandb"] = None  # type: ignore[assignment]  # Python's way to make `import wandb` an ImportError
    try:
        import timm.utils  # noqa: F401  # imported for what it leaves in sys.modules
    finally:
        del sys.modules["wandb"]
