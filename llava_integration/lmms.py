"""Another name of :mod:`llava_integration.evaluate.lmms`, for programs that import it from here."""

from llava_integration.evaluate.lmms import *  # noqa: F403
from llava_integration.evaluate.lmms import __all__ as __all__
