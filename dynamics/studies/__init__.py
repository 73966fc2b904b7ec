"""The papers behind the toolkit, replicated: one file each, with claims that hold here or do not."""

from .catalogue import STUDIES, study, study_named
from .result import Claim, Heat, Line, Panel, StudyResult

__all__ = ["STUDIES", "Claim", "Heat", "Line", "Panel", "StudyResult", "study", "study_named"]
