"""One suite for all implementations of an interface."""

import pytest

# pytest explains the assertions of test modules by itself, but not those of the suites that they import.
pytest.register_assert_rewrite(
    "tests.contract.store_contract", "tests.contract.catalog_contract", "tests.contract.containers_contract"
)
