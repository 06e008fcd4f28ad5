"Hand name, version, Python floor, requirements and extras from settings.ini to setuptools."

from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

ini = ConfigParser(interpolation=None)
ini.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
settings = ini["DEFAULT"]


def listed(name: str) -> list[str]:
    "The requirements under a key of settings.ini, one a line."
    lines = [line.strip() for line in settings[name].splitlines()]
    return [line for line in lines if line]


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    license=settings["license"],
    python_requires=">=" + settings["min_python"],
    install_requires=listed("requirements"),
    extras_require={
        key.removeprefix("extra_"): listed(key) for key in settings if key.startswith("extra_")
    },
    entry_points={"console_scripts": ["tpro-nb = tpro_nb.cli:main"]},
)
