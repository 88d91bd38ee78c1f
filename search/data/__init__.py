"""An uploaded file to batches, safely."""

from search.data.fit import check_fit, fitted
from search.data.reading import read_data
from search.data.split import Batch, Data, Split

__all__ = ["Batch", "Data", "Split", "check_fit", "fitted", "read_data"]
