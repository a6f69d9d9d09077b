"""The strategies that a study can name, and their options: how a round's updates become a model, and what a site does with it."""

from typing import Annotated, Literal

from pydantic import Field

from shared.config import Momentum, Positive, Real, Settings


class _StrategyOptions(Settings):
    fraction: Real = Field(default=1.0, gt=0, le=1, description="share of the sites asked in a round")
    weights: Literal["declared", "equal"] = Field(default="declared", description="a site's weight in the mean: declared size, or 1")
    largest_update: Positive | None = Field(
        default=None,
        description="L2 norm above which an update is refused, and costs its site the round; omitted, and at most: 1000 times the model's, or 1000",
    )

    @property
    def least_updates(self) -> int:
        """Usable updates that a round needs at least."""
        return 1


class _Robust(_StrategyOptions):
    weights: Literal["equal"] = Field(default="equal", description="sites count alike: a large one may be bad as well")
    tolerated: int = Field(default=1, ge=1, description="bad sites that may be among those asked in a round")


class FedAvg(_StrategyOptions):
    """McMahan et al. 2017."""

    name: Literal["fedavg"] = "fedavg"


class FedProx(_StrategyOptions):
    """Li et al. 2020."""

    name: Literal["fedprox"]
    proximal_mu: Real = Field(default=0.1, ge=0)


class FedAvgM(_StrategyOptions):
    """Hsu et al. 2019."""

    name: Literal["fedavgm"]
    server_learning_rate: Positive = 1.0
    server_momentum: Momentum = 0.9


class _Adaptive(_StrategyOptions):
    server_learning_rate: Positive = 0.1
    tau: Positive = Field(default=1e-3, description="degree of adaptivity, added to the root of the second moment")


class FedAdagrad(_Adaptive):
    """Reddi et al. 2021."""

    name: Literal["fedadagrad"]


class FedAdam(_Adaptive):
    """Reddi et al. 2021."""

    name: Literal["fedadam"]
    beta_1: Momentum = 0.9
    beta_2: Momentum = 0.99


class FedYogi(_Adaptive):
    """Reddi et al. 2021."""

    name: Literal["fedyogi"]
    beta_1: Momentum = 0.9
    beta_2: Momentum = 0.99


class CoordinateMedian(_StrategyOptions):
    """Yin et al. 2018."""

    name: Literal["median"]
    weights: Literal["equal"] = Field(default="equal", description="sites count alike: a large one may be bad as well")

    @property
    def least_updates(self) -> int:
        """Of fewer, one bad site decides."""
        return 3


class TrimmedMean(_Robust):
    """Yin et al. 2018."""

    name: Literal["trimmed-mean"]

    @property
    def least_updates(self) -> int:
        """Something must be left in the middle."""
        return 2 * self.tolerated + 1


class Krum(_Robust):
    """Blanchard et al. 2017."""

    name: Literal["krum"]

    @property
    def least_updates(self) -> int:
        """Their theorem needs it."""
        return 2 * self.tolerated + 3


class MultiKrum(_Robust):
    """Blanchard et al. 2017."""

    name: Literal["multi-krum"]
    selected: int | None = Field(default=None, ge=1, description="updates that are averaged; omitted, and at most: all but tolerated + 2")

    @property
    def least_updates(self) -> int:
        """Their theorem needs it."""
        return 2 * self.tolerated + 3


class Bulyan(_Robust):
    """El Mhamdi et al. 2018."""

    name: Literal["bulyan"]

    @property
    def least_updates(self) -> int:
        """Their theorem needs it."""
        return 4 * self.tolerated + 3


class GeometricMedian(_StrategyOptions):
    """RFA: Pillutla et al. 2022."""

    name: Literal["rfa"]
    smoothing: Positive = Field(default=1e-6, description="least distance that an update is taken to have")

    @property
    def least_updates(self) -> int:
        """Of fewer, one bad site decides."""
        return 3


class NormBounding(_StrategyOptions):
    """Sun et al. 2019."""

    name: Literal["norm-bounding"]
    max_update_norm: Positive = Field(default=1.0, description="an update that is longer is scaled down to it, and counts; see largest_update")


class QFedAvg(_StrategyOptions):
    """Li et al. 2020, "Fair Resource Allocation in Federated Learning"."""

    name: Literal["q-fedavg"]
    q: Real = Field(default=1.0, ge=0, le=10, description="0: as fedavg; more: sites with a high loss count for more")
    max_loss: Positive = Field(default=2.0, description="a record's loss counts for at most this; its noise, under privacy, is in proportion")


class FedNova(_StrategyOptions):
    """Wang et al. 2020."""

    name: Literal["fednova"]


class Scaffold(_StrategyOptions):
    """Karimireddy et al. 2020, option II."""

    name: Literal["scaffold"]
    weights: Literal["equal"] = Field(default="equal", description="sites count alike, as control variates do")
    server_learning_rate: Positive = 1.0


class FedDyn(_StrategyOptions):
    """Acar et al. 2021."""

    name: Literal["feddyn"]
    weights: Literal["equal"] = Field(default="equal", description="sites count alike, as their regularisers do")
    alpha: Positive = Field(default=0.1, description="of the dynamic regulariser")


class FedBN(_StrategyOptions):
    """Li et al. 2021: normalisation stays at the site; under privacy that is the scale and shift of GroupNorm or LayerNorm."""

    name: Literal["fedbn"]


class _Head(_StrategyOptions):
    head: tuple[str, ...] = Field(
        default=(), strict=False, description="names of the layers that stay at the site; empty: the last one with parameters"
    )


class FedPer(_Head):
    """Arivazhagan et al. 2019: the head stays at the site, and is trained together with the body."""

    name: Literal["fedper"]


class FedRep(_Head):
    """Collins et al. 2021: the head stays at the site, and is trained first, on the body as received; then the body."""

    name: Literal["fedrep"]
    head_share: Real = Field(default=0.5, gt=0, lt=1, description="of a round's steps, for the head")


class Ditto(_StrategyOptions):
    """Li et al. 2021, "Ditto": a model of the site's own, trained beside the shared one and pulled towards it."""

    name: Literal["ditto"]
    proximal_lambda: Real = Field(default=0.1, ge=0, description="how strongly")


class Apfl(_StrategyOptions):
    """Deng, Kamani and Mahdavi 2020: a site's model is a mixture of the shared one and one of its own."""

    name: Literal["apfl"]
    alpha: Real = Field(default=0.5, ge=0, le=1, description="share of the site's own in the mixture, at first")
    adaptive_alpha: bool = Field(default=True, description="whether the share is learnt as well")


class FineTuning(_StrategyOptions):
    """FedAvg, and after the last round every site trains the final model a little further, for itself (Wang et al. 2019)."""

    name: Literal["fine-tuning"]
    fine_tuning_epochs: int = Field(default=1, ge=1, le=1000, description="expected passes over the site's patients")


class Cyclic(_StrategyOptions):
    """Chang et al. 2018: in every round the model goes from site to site, in an order drawn anew, and each trains it further."""

    name: Literal["cyclic"]
    weights: Literal["equal"] = Field(default="equal", description="each site's update is taken whole")


class FedBuff(_StrategyOptions):
    """Nguyen et al. 2022: a round ends as soon as enough updates are there; who is still at work works on, and counts later, for less."""

    name: Literal["fedbuff"]
    weights: Literal["equal"] = Field(default="equal", description="sites count alike, but for the age of the model that they trained")
    buffer_size: int = Field(default=3, ge=1, description="updates of a round, at which the server steps")
    server_learning_rate: Positive = 1.0
    largest_staleness: int = Field(default=20, ge=0, description="rounds since the model that an update was trained on; an older one is refused")

    @property
    def least_updates(self) -> int:
        """The buffer is full."""
        return self.buffer_size


PERSONAL = (FedBN, FedPer, FedRep, Ditto, Apfl, FineTuning)  # a site is judged by a model of its own
PARTIAL = (FedBN, FedPer, FedRep)  # part of which is all that it shares
SUMS_ALONE = (FedAvg, FedProx, FedAvgM, FedAdagrad, FedAdam, FedYogi, Scaffold, FedDyn, *PERSONAL)  # a weighted mean of updates is all they need
Strategy = Annotated[
    FedAvg | FedProx | FedAvgM | FedAdagrad | FedAdam | FedYogi
    | CoordinateMedian | TrimmedMean | Krum | MultiKrum | Bulyan | GeometricMedian | NormBounding
    | QFedAvg | FedNova | Scaffold | FedDyn | FedBN | FedPer | FedRep | Ditto | Apfl | FineTuning | Cyclic | FedBuff,
    Field(discriminator="name"),
]  # fmt: skip
