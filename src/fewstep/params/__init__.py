"""params.yaml: the blocks that it is made of, how it is read, and what is refused.

A file passes through three checks before anything is built, and every problem is reported at once:
what YAML itself hides (`reading`), each value by itself (`schema`), values beside one another
(`checks`). What the keys mean stands at the fields of the blocks.
"""

from fewstep.params.blocks import (
    Churn,
    Data,
    Generate,
    Network,
    Noise,
    Params,
    Performance,
    Row,
    Sweep,
    Tracking,
    Wandb,
)
from fewstep.params.loading import load_params
from fewstep.params.merging import merged, merged_students
from fewstep.params.methods import Settings, settings_of
from fewstep.params.problems import ParamsError
from fewstep.params.scoring import (
    Bootstrap,
    InceptionScoreSettings,
    KidSettings,
    ManifoldSettings,
    MemorisationSettings,
    Metric,
)
from fewstep.params.sweeps import swept_rows
from fewstep.params.training import (
    Baseline,
    Download,
    Ema,
    Import,
    Phema,
    Student,
    Teacher,
    Validation,
)
from fewstep.params.values import digest, key_of, plain
