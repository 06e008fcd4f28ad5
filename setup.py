"settings.ini is the one source of name, version, Python floor, requirements and extras; this hands them to setuptools."
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

ini = ConfigParser(interpolation=None)
ini.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
lines = lambda s: [x.strip() for x in s.splitlines() if x.strip()]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], license=cfg["license"],
    python_requires=">=" + cfg["min_python"], install_requires=lines(cfg["requirements"]),
    extras_require={k.removeprefix("extra_"): lines(v) for k, v in cfg.items() if k.startswith("extra_")},
    entry_points={"console_scripts": ["tpro-nb = tpro_nb.pipeline:main"]},
)
