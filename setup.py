"""Packaging: everything is read from settings.ini, as nbdev projects do; the study notebooks travel in the wheel."""

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(HERE / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


def requirements(key: str) -> list[str]:
    """The space-separated requirements of one key of settings.ini."""
    return cfg.get(key, "").split()


class BuildWithNotebooks(build_py):
    """Copy `nbs/study/*.ipynb` beside the modules, so that an installed package can run the study."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / cfg["lib_name"] / "study_notebooks"
            target.mkdir(parents=True, exist_ok=True)
            for notebook in sorted((HERE / cfg["nbs_path"] / "study").glob("*.ipynb")):
                shutil.copy(notebook, target)


train, dev = requirements("train_requirements"), requirements("dev_requirements")
setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    keywords=cfg["keywords"],
    license="Apache-2.0",
    packages=find_packages(include=[cfg["lib_name"], cfg["lib_name"] + ".*"]),
    package_data={cfg["lib_name"]: ["templates/**/*"]},  # text, styles, checklists
    python_requires=">=" + cfg["min_python"],
    install_requires=requirements("requirements"),
    extras_require={"train": train, "dev": train + dev},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
    cmdclass={"build_py": BuildWithNotebooks},
    zip_safe=False,
)
