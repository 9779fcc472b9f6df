"""Score distillation by three teachers against the published code's recorded numbers."""

from tests.parity import guidance
from tests.recordings import OFFICIAL


def test_every_recorded_case_of_guidance():
    assert guidance.main([str(OFFICIAL)]) == 0
