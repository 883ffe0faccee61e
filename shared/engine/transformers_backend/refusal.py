"""Why a model directory is not served through transformers: for those who do without torch.

    python -m baton.shared.engine.transformers_backend.refusal DIR

Prints the reason and exits with REFUSED; no weights are read.
"""

from __future__ import annotations

import sys
from pathlib import Path

from baton.shared.model_files.fields import ModelError
from baton.shared.model_files.info import open_config

REFUSED = 3


def main() -> int:
    from baton.shared.engine.transformers_backend.config import configure

    try:
        configure(open_config(Path(sys.argv[1])))
    except ModelError as error:
        print(error)  # noqa: T201
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
