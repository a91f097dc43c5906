"""The source article's ten claims, as data.

Case A is one dense map over all features (another function, a yardstick), case B a loop of `n` linears, case C the
masked dense map. The article gives sizes as totals over partitions (1024 is 32 a partition, 8096 is 253) and says
neither what its times include nor which GPU or dtype they are of.
"""

from dataclasses import dataclass

DENSE, LOOP, MASKED = "dense", "loop", "masked"
GPU, CPU, MEMORY = "gpu", "cpu", "memory"
AT_LEAST, ABOUT, SLOWER_THAN_LOOP = "at least", "about", "slower"
# "About 2.5x" is kept by anything from 2x to 3.125x: the article rounds, and gives no interval.
ABOUT_FACTOR = 1.25


@dataclass(frozen=True)
class Part:
    """One ratio of a claim.

    Attributes:
        case: the competitor that is compared with `loop`.
        relation: `at least`, `about` or `slower`.
        ratio: speed over that of `loop`; for memory, bytes over those of `loop`.
    """

    case: str
    relation: str
    ratio: float

    @property
    def text(self) -> str:
        """The claim in words."""
        if self.relation == SLOWER_THAN_LOOP:
            return f"{self.case} slower than loop"
        return f"{self.case} {self.relation} {self.ratio:g}x"


@dataclass(frozen=True)
class Claim:
    """One claim of the article.

    Attributes:
        number: in the order of the table in the design.
        setting: as the article gives it.
        statement: as the article gives it.
        subject: `gpu`, `cpu` (speed on that device) or `memory`.
        workloads: names in the catalogue, with sizes per partition.
        parts: what is compared.
    """

    number: int
    setting: str
    statement: str
    subject: str
    workloads: tuple[str, ...]
    parts: tuple[Part, ...]


def _both(relation: str, dense: float, masked: float) -> tuple[Part, ...]:
    return (Part(DENSE, relation, dense), Part(MASKED, relation, masked))


CLAIMS: tuple[Claim, ...] = (
    Claim(
        1,
        "batch <= 128, in = out = 1024 in total, n = 32",
        "A and C more than 10x faster than B",
        GPU,
        ("article-base", "article-batch-1"),
        _both(AT_LEAST, 10, 10),
    ),
    Claim(
        2,
        "one dense 1024 -> 1024 in 0.09648 s, the loop in 1.20879 s",
        "A about 12.5x faster than B",
        GPU,
        ("article-base",),
        (Part(DENSE, ABOUT, 12.5),),
    ),
    Claim(3, "batch = 2048", "A only 1.5x faster than B", GPU, ("article-batch-2048",), (Part(DENSE, ABOUT, 1.5),)),
    Claim(4, "n <= 8", "B faster than A and C", GPU, ("article-n8",), _both(SLOWER_THAN_LOOP, 1, 1)),
    Claim(
        5,
        "in = 8096 in total (253 a partition)",
        "A about 2.5x, C about 1.5x faster than B",
        GPU,
        ("article-in8096",),
        _both(ABOUT, 2.5, 1.5),
    ),
    Claim(6, "in = 256 in total", "A and C about 18x faster than B", GPU, ("article-in256",), _both(ABOUT, 18, 18)),
    Claim(
        7,
        "out = 8096 in total (253 a partition)",
        "A about 2.5x, C about 1.5x faster than B",
        GPU,
        ("article-out8096",),
        _both(ABOUT, 2.5, 1.5),
    ),
    Claim(8, "out = 256 in total", "A and C about 18x faster than B", GPU, ("article-out256",), _both(ABOUT, 18, 18)),
    Claim(
        9,
        "on a CPU",
        "masking pays only on a GPU: C slower than B on a CPU",
        CPU,
        ("article-base", "article-batch-1", "article-batch-2048"),
        (Part(MASKED, SLOWER_THAN_LOOP, 1),),
    ),
    Claim(
        10,
        "memory, n = 32",
        "masking costs much more memory: parameters and their gradients are n times larger",
        MEMORY,
        ("article-base", "article-batch-2048"),
        # "Much more" in bytes of a whole call, activations included; the parameters alone are exactly n times larger.
        (Part(MASKED, AT_LEAST, 2),),
    ),
)
