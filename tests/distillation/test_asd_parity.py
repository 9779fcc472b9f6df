"""Score distillation by three teachers against the published code's recorded numbers."""

from tests.fixtures import OFFICIAL, needs_fixtures
from tests.parity import guidance


@needs_fixtures
def test_every_recorded_case_of_guidance():
    assert guidance.main([str(OFFICIAL)]) == 0
