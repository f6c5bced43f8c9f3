import pytest


@pytest.fixture(scope="session")
def transformers_module():
    """transformers is slow to import: once, and without its advice."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers
