"""Operations on one volume at the same time, each stopped anywhere, against a model that looks on.

Owns the search that `t1_model/test_pairs.py` runs. A `Trial` is made from its seed alone: a scene
(a volume with a past), two to four operations, where each of them but the last is stopped, what
fails, how the volume's process ends. An operation is stopped at its nth call of a worker thread,
before or after the work itself, as a slow disk does it; what it has started (a growth, the carrying
out of the write buffer) counts as its own. The next one then runs as far as it can; then all go on.

The model is the history of what was asked, and what was answered when. `explained` looks for an
order of it, no answer before its question, that leads to what is there: the replica's content and
every point. A point that is missing must have been deleted or told lost. Afterwards the volume is
opened anew, shows the same, comes online, and works.
"""

from .history import UndecidedError
from .operations import OPERATIONS, SCENES
from .trial import Trial

__all__ = ["OPERATIONS", "SCENES", "Trial", "UndecidedError"]
