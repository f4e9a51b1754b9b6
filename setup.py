"The package descgen: everything it says about itself is read from settings.ini."
from configparser import ConfigParser
from setuptools import setup, find_packages

ini = ConfigParser(delimiters=["="])
ini.read("settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"], license="Apache-2.0",
    packages=find_packages(include=["descgen"]), package_data={"descgen": ["*.j2"]},
    python_requires=f">={cfg['min_python']},<3.14", install_requires=cfg["requirements"].split(), extras_require={"dev": cfg["dev_requirements"].split()},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    long_description=open("README.md", encoding="utf-8").read(), long_description_content_type="text/markdown",
)
