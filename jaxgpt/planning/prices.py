"""What a chip costs: read from prices.toml beside this file, or from the user's own."""

import dataclasses
import tomllib
from pathlib import Path

from jaxgpt.errors import UserError
from jaxgpt.planning.topology import FAMILIES

PRICES_FILE = Path(__file__).with_name("prices.toml")


@dataclasses.dataclass(frozen=True)
class Price:
    usd_per_chip_hour: float
    date: str
    source: str


def read_prices(file: Path | None = None) -> dict[str, Price]:
    """{"v5e": Price, ...}

    Raises:
        UserError: the file is missing or holds something else.
    """
    file = file or PRICES_FILE
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--prices {file}: no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--prices {file}: not a readable TOML file ({error})") from None
    return {family: _price(file, family, entry) for family, entry in content.items()}


def _price(file: Path, family: str, entry: object) -> Price:
    if family not in FAMILIES:
        raise UserError(f"--prices {file}: [{family}] is no chip; known: {', '.join(FAMILIES)}")
    names = [field.name for field in dataclasses.fields(Price)]
    if not isinstance(entry, dict) or set(entry) != set(names):
        raise UserError(f"--prices {file}: [{family}] must hold {', '.join(names)}, and nothing else")
    usd = entry["usd_per_chip_hour"]
    if isinstance(usd, bool) or not isinstance(usd, (int, float)) or usd <= 0:
        raise UserError(f"--prices {file}: [{family}] usd_per_chip_hour = {usd!r}, but it must be a number above 0")
    return Price(float(usd), str(entry["date"]), str(entry["source"]))
