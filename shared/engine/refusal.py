"""Why a model directory would not be served: for those who do without torch.

    python -m baton.shared.engine.refusal DIR

Makes the plan that a worker makes before it reads weights: of config.json, which of a type without
code of Baton's own transformers reads, and of the headers of the files, whose shapes are compared
with it. Prints the reason and exits with REFUSED.
"""

from __future__ import annotations

import sys
from pathlib import Path

from baton.shared.model_files.fields import ModelError

REFUSED = 3


def main() -> int:
    import torch

    from baton.shared.engine.config import EngineConfig
    from baton.shared.engine.implementation import find_implementation, find_weights
    from baton.shared.engine.reference_operations import ReferenceOperations
    from baton.shared.kv.cache_spec import cache_groups

    try:
        config = EngineConfig(Path(sys.argv[1]))
        implementation = find_implementation(config)
        model = implementation.config
        weights = find_weights(config, model)
        groups = cache_groups(model.cache_specs)
        implementation.plan(weights, groups, ReferenceOperations(), torch.float32)
    except ModelError as error:
        print(error)  # noqa: T201
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
