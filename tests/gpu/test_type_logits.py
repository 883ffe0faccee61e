"""Every model type on the GPU: logits against the float32 reference, as test_logits.py has them, of
random tiny models. Tokens of mixtures get the reference's experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gpu.conftest import MakeRunner
from tests.gpu.forced_routes import ForcedRoutes
from tests.gpu.test_logits import TOLERANCE, compare, of_groups, random_tokens
from tests.unit.engine.tiny_models import TINY_MODELS, make_tiny

pytestmark = pytest.mark.gpu

CASES = [(model_type, case) for model_type, cases in TINY_MODELS.items() for case in cases]


@pytest.mark.parametrize(("model_type", "case"), CASES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_random_model(
    model_type: str,
    case: str,
    dtype: str,
    tmp_path: Path,
    make_gpu_runner: MakeRunner,
    make_reference: MakeRunner,
    record_property: Callable[[str, object], None],
) -> None:
    fields = TINY_MODELS[model_type][case]
    make_tiny(tmp_path, model_type, fields, is_calm=dtype == "bfloat16")
    # As many rows as a step of these has: there is less to compile.
    runner = make_gpu_runner(tmp_path, dtype=dtype, max_num_seqs=4, cuda_graphs=False)
    reference = make_reference(tmp_path)
    forced = ForcedRoutes()
    if reference.model_config.mixture is not None:
        forced.listen_to(reference)
        forced.impose_on(runner)
    prompt_of = random_tokens(reference.model_config.vocab_size)
    error = compare(runner, reference, prompt_of, TOLERANCE[dtype], of_groups(runner, reference))
    record_property("error", error)
    record_property("flipped_routes", f"{len(forced.margins)} of {forced.num_routes}")
    record_property("largest_margin_of_a_flip", max(forced.margins, default=0.0))
