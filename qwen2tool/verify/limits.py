"""The bars of the verdict, each with its reason. Everything else is measured in the run itself."""

from __future__ import annotations

NOISE_MULTIPLE = 1.5
"""Mean and 99 % KLD may be this many times the floor's where every tensor is accounted for. The floor is itself a
sample: another kernel, thread count or text moves it by tens of percent, a lost bias by a factor of ten or more."""
MATRIX_MULTIPLE = 1.0
"""Where matrices differ beyond a rounding there is no benefit of the doubt: within the floor, or not decided."""
SMALLEST_MEAN_KLD = 1e-8
SMALLEST_99_KLD = 1e-6
"""What fp32 sums in another order can cost: eager against sdpa on a real Qwen2.5-0.5B gives a mean of 1.6e-9 and 2e-7
at 99 %. A floor below these is luck, and a multiple of luck is no bar. Losing its least useful bias: 1.8e-3."""
STANDARD_ERRORS = 2.0
"""A mean over the bar by less than this many of its own standard errors is not decided: more text would tell."""
FEWEST_TOKENS = 32
"""Scored tokens below which neither a mean nor its error says anything."""
UPDATE_SLACK = 2.0**-20
"""Of the largest entry of B A: where W and the update cancel, the order of fp32 sums over the rank shows by more than
one unit of the (tiny) result. 2**-20 is sixteen fp32 roundings; a bf16 unit is 2**-8."""
ROUTE_FLOOR = {"float32": 1e-6, "float16": 1e-4, "bfloat16": 8e-4}
"""Relative error that a fused layer may show where transformers' own happens to be exact: what one rounding costs."""
ROUTE_LUCK = 2.0
"""Times its bar at which a fused layer is wrong, not unlucky. In short texts near-ties of attention decide whose
rounding looks better: of 96 runs of right layers on 30 tokens the worst gradient was at 1.37, on 140 tokens at 0.82 on
a CPU, and at 1.2 once on an H100."""
