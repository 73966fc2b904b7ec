"""A trajectory as one pandas table, and that as a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .database import Database
from .schema import decode, explained

if TYPE_CHECKING:
    import pandas as pd


def pandas_table(database: Database) -> pd.DataFrame:
    """All rows, ordered by step, quantity, block and index, whatever the order in which they were written."""
    import pandas as pd

    found = database.query(
        'SELECT step, quantity, block, "index", value, error, converged, products, seconds FROM measured '
        'ORDER BY step, quantity, block, "index"'
    )
    columns = list(zip(*found, strict=True)) or [()] * 9
    step, quantity, block, index, value, error, converged, products, seconds = columns
    return pd.DataFrame(
        {
            "step": np.array(step, dtype=np.int64),
            "quantity": pd.Series(quantity, dtype="str"),
            "block": pd.Series(block, dtype="str"),
            "index": np.array(index, dtype=np.int64),
            "value": np.array([decode(x) for x in value], dtype=np.float64),
            "error": np.array([decode(x) for x in error], dtype=np.float64),
            "converged": np.array(converged, dtype=bool),
            "products": np.array(products, dtype=np.int64),
            "seconds": np.array([decode(x) for x in seconds], dtype=np.float64),
        }
    )


def write_csv(table: pd.DataFrame, path: Path) -> None:
    with explained(path, "writing the CSV file"):
        table.to_csv(path, index=False, na_rep="nan")


def write_parquet(table: pd.DataFrame, path: Path) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ImportError("`to_parquet` needs pyarrow: pip install 'sharpscope[export]'") from error
    with explained(path, "writing the Parquet file"):
        table.to_parquet(path, index=False)
