"""mkdocs: what guides show of the tree outside docs/.

Pictures of benchmarks/results become images of the site; other links that leave docs/, which GitHub
follows, keep their text alone.
"""

import pathlib
import re

from mkdocs.structure.files import File

RESULTS = "benchmarks/results"


def on_files(files, config):
    for picture in pathlib.Path(config.config_file_path).parent.glob(f"{RESULTS}/*.png"):
        files.append(File.generated(config, f"images/{picture.name}", abs_src_path=str(picture)))


def on_page_markdown(markdown, page, **_):
    if "/" in page.file.src_uri:  # a page of docs/api
        return markdown
    markdown = markdown.replace(f"](../{RESULTS}/", "](images/")
    return re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\)", r"\1", markdown)
