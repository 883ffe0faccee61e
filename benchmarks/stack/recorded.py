"""What vLLM 0.26.0 was measured at: two H200s of one host, Llama-3.1-8B shape, dummy weights, bf16,
prefix cache off, random prompts, Poisson arrivals for 22 s, one client process, 2026-11-21."""

from __future__ import annotations

from typing import NamedTuple

Triple = tuple[float, float, float]


class Recorded(NamedTuple):
    """Times in ms; percentiles 50, 90, 99. `attained`: share with TPOT up to 25 ms, and TTFT up to
    1 s (2,048 tokens) or 2 s (8,192)."""

    ttft: Triple
    tpot: Triple
    gap_p90: float
    attained: float


# (prompt tokens, output tokens) → requests a second → arrangement
VLLM: dict[tuple[int, int], dict[float, dict[str, Recorded]]] = {
    (2048, 256): {
        10: {"pd": Recorded((112, 212, 328), (6.3, 6.9, 7.1), 35, 1.0)},
        16: {
            "pd": Recorded((193, 353, 501), (8.2, 8.7, 8.9), 51, 1.0),
            "replicas": Recorded((64, 94, 148), (9.8, 11.3, 12.2), 84, 1.0),
        },
        22: {
            "pd": Recorded((1511, 1950, 2241), (11.7, 12.3, 12.4), 64, 0.26),
            "replicas": Recorded((74, 134, 176), (13.8, 19.6, 21.3), 108, 1.0),
        },
        28: {"replicas": Recorded((177, 297, 425), (41.3, 56.6, 59.0), 282, 0.15)},
    },
    (8192, 256): {
        3: {"pd": Recorded((410, 783, 1140), (7.5, 9.1, 9.2), 62, 1.0)},
        4: {"replicas": Recorded((232, 355, 604), (9.8, 13.3, 14.9), 204, 1.0)},
        5: {"pd": Recorded((2484, 4275, 4685), (10.1, 10.2, 10.3), 66, 0.38)},
        6: {"replicas": Recorded((273, 585, 811), (25.1, 30.2, 31.8), 230, 0.48)},
        7.5: {"replicas": Recorded((494, 926, 1213), (34.4, 57.2, 61.2), 243, 0.21)},
    },
}
