"""Packaging of the three import packages and the data they read."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def requirements(name: str) -> list[str]:
    """The requirement lines of a file, without comments."""
    lines = ((line.split("#")[0]).strip() for line in (HERE / name).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("-")]


setup(
    name="stepaudio",
    version="0.1.0",
    description="Speech chat, recognition and synthesis with the Step-Audio models",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        *find_packages(include=["tokenizer*", "cosyvoice*", "stepaudio*"]),
        "configs",
    ],
    package_data={"configs": ["*.yaml"]},
    install_requires=requirements("requirements.txt"),
    extras_require={
        "dev": requirements("requirements-dev.txt"),
        "eval": ["pocketsphinx>=5", "speechmos", "requests"],  # outside judges of speech; speechmos imports requests
        "normalize": ["wetext>=0.0.4"],
    },
    entry_points={"console_scripts": ["stepaudio = stepaudio.cli:entry"]},
)
