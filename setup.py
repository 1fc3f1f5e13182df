"""What pyproject.toml cannot say of flat modules: the live page is installed beside them."""

import os

from setuptools import setup
from setuptools.command.build_py import build_py

PAGE = "dashboard.html"


class BuildWithPage(build_py):
    """Builds the modules, and the page with them."""

    def run(self) -> None:
        """Copies the page to where the modules are built."""
        super().run()
        if not self.editable_mode:
            self.copy_file(PAGE, os.path.join(self.build_lib, PAGE))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """What was built, the page among it."""
        return [*super().get_outputs(include_bytecode), os.path.join(self.build_lib, PAGE)]


setup(cmdclass={"build_py": BuildWithPage})
