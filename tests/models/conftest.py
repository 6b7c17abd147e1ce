"""Shared by the tests of models: services that listen on this machine."""

import pytest

from tests.models.listening import Listening


@pytest.fixture
def listen():
    """A function: a service that answers as its argument says; closed after the test."""
    services = []

    def start(answer):
        services.append(Listening(answer))
        return services[-1]

    yield start
    for service in services:
        service.close()
