"""How rows are scored."""

from typing import Literal

from fewstep.params.fields import Count, ProperShare, Several, block
from fewstep.params.training import Download


@block()
class KidSettings:
    subsets: Several
    """random subsets that are averaged over"""
    subset_size: Several
    """images of a subset"""


@block()
class ManifoldSettings:
    k: Count
    """neighbour that the balls of precision and recall reach to. Published: 3"""
    density_k: Count
    """neighbour that the balls of density and coverage reach to. Published: 5"""


@block()
class MemorisationSettings:
    """Without `images` the reference images are looked through."""

    k: Count
    """nearest training images that are reported"""
    expected: ProperShare
    """share of real images that count as near-duplicates of others. When a larger share of samples
    does, training images are being reproduced"""
    images: Several | None = None
    """training images that are looked through; absent = the reference images"""


@block()
class InceptionScoreSettings:
    splits: Count
    """parts that are scored one by one"""


@block()
class Bootstrap:
    """How sure a value from one seed range is, and a difference of two rows."""

    resamples: Several
    """resamples of a row's images. Each costs one distance: 20 ms at 112 features, 10 s at 2,048 of
    50,000 images"""
    confidence: ProperShare
    """of the interval of a difference. That `fewstep compare` prints"""


@block()
class Metric:
    """Each optional block is a further metric; `weights` belong to networks no package brings.

    `reference` is a file of published statistics for the Fréchet distance; without it they come
    from `reference_images` images of the data, as what other metrics compare with always does.
    """

    features: Literal["efficientnet-lite0", "inception-2015", "dinov2", "clip"]
    """network whose features are compared. The distances are called FD-EffLite0, FID, FD-DINOv2,
    FD-CLIP (and CMMD)"""
    reference_images: Several
    """real images that rows are compared with. The floor is the distance of others to them: as many
    as a range has, or beside a `reference` as many as there are"""
    weights: Download | None = None
    """the weights of that network, where no package brings them. Fetched by `ref-stats`; a package
    brings those of `efficientnet-lite0`. NVIDIA's pickle is a program and is refused; use the
    `.pth`. Only a distance with the published Inception weights is called `FID`"""
    reference: Download | None = None
    """published mean and covariance of real images, for the Fréchet distance; absent = from
    reference_images. An `.npz` with `mu` and `sigma` such as EDM's `fid-refs`; validation uses
    it too. All other metrics, sFID among them, always compare with images of our own data. Every
    result carries its sha256"""
    kid: KidSettings | None = None
    """Kernel Inception Distance; absent = none"""
    manifold: ManifoldSettings | None = None
    """precision, recall, density and coverage; absent = none. With as many real images as a seed
    range has"""
    memorisation: MemorisationSettings | None = None
    """share of images that are near-duplicates of training images; absent = none"""
    inception_score: InceptionScoreSettings | None = None
    """Inception Score, of inception-2015 alone; absent = none"""
    bootstrap: Bootstrap | None = None
    """errors of values from one seed range, and of differences; absent = no errors. The latter by
    `fewstep compare`"""
