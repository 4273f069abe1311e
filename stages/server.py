"""`python -m stages.server NAME`: ask a server what it is and what it can → artifacts/servers/NAME."""

from pipeline.files import Folders
from pipeline.params import pick, resolved_params
from pipeline.teachers.server_meeting import ask_server
from stages import run


def main(name: str) -> None:
    """Meet one server."""
    ask_server(name, pick("servers", resolved_params().servers, name), Folders.here())


if __name__ == "__main__":
    run(main)
