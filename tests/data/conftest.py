import pytest

from phase1.config import DataConfig

ENGLISH = (
    "The cat sat on the mat , and the dog didn't mind .  It's 1 @,@ 234 meters away !\n \n = Heading = \n\n"
    "Ça coûte 12 € — « déjà vu » … 東京は大きい。 🙂 don't we'll they've\t\ttabs  and   spaces\r\n"
)


@pytest.fixture
def data_config(tmp_path):
    """A DataConfig whose cache is empty and belongs to the test."""
    return lambda name, **fields: DataConfig(dataset_name=str(name), cache_dir=str(tmp_path / "cache"), **fields)


@pytest.fixture
def english():
    """A line or two of text with every kind of character that a tokenizer treats apart."""
    return ENGLISH
