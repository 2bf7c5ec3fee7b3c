"""Times tile sizes on a GPU and keeps the fastest in a file: `python -m pallas_kernels.autotune --help`.

>>> from pallas_kernels import autotune
>>> autotune.load("tuned.json")                                   # doctest: +SKIP
"""

from pallas_kernels.autotune.measure import Result as Result
from pallas_kernels.autotune.measure import rank_cell as rank_cell
from pallas_kernels.autotune.measure import time_cell as time_cell
from pallas_kernels.autotune.tuned_file import COMPILED as COMPILED
from pallas_kernels.autotune.tuned_file import TIMED as TIMED
from pallas_kernels.autotune.tuned_file import load as load
from pallas_kernels.autotune.tuned_file import save as save
