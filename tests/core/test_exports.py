"""What `import tunesmith` offers."""

import tunesmith
from tunesmith import api


def test_the_names_are_those_of_the_api_and_all_are_there():
    assert tunesmith.__all__ == api.__all__
    for name in tunesmith.__all__:
        assert getattr(tunesmith, name) is getattr(api, name)
        assert getattr(tunesmith, name).__doc__ or isinstance(getattr(tunesmith, name), dict | tuple)
