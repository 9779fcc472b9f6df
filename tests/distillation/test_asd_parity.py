"""Score distillation by three teachers against the published code's recorded numbers."""

from tests.recordings import OFFICIAL
from tests.parity import guidance


def test_every_recorded_case_of_guidance():
    assert guidance.main([str(OFFICIAL)]) == 0
