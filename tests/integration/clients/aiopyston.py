"""Tests a running server with the published client aiopyston, used as in its documentation."""

import asyncio
import sys

from pyston import File, PystonClient
from pyston.exceptions import ExecutionError


async def main(base_url):
    client = PystonClient(base_url=base_url)

    languages = await client.languages()
    assert languages == {"python", "c"}, languages
    (runtime,) = await client.get_runtimes("py")
    assert (runtime.language, runtime.version) == ("python", "3.0.0"), runtime

    code = "import sys, helper\nprint(sys.stdin.read(), sys.argv[1:], helper.N)"
    files = [File(code), File("N = 42", "helper.py")]
    output = await client.execute("python", files, stdin="typed", args=["a", "b c"])
    assert str(output) == "typed ['a', 'b c'] 42\n", output.raw_json
    assert output.run_stage.code == 0 and output.run_stage.signal is None and output.success, output.raw_json

    output = await client.execute("c", [File("int main(void) { return 3; }", "x.c")], version=">=1.0.0 <2")
    assert output.compile_stage.code == 0 and output.run_stage.code == 3, output.raw_json
    output = await client.execute("c", [File("int main(void) { return x; }")])
    assert output.compile_stage.code != 0 and output.run_stage is None, output.raw_json

    output = await client.execute("python", [File("while True: pass")], run_timeout=1000)
    assert output.run_stage.signal == "SIGKILL" and output.run_stage.code is None, output.raw_json
    try:
        await client.execute("cobol", [File("")])
    except ExecutionError as error:
        assert "runtime is unknown" in str(error), error
    else:
        raise AssertionError("an unknown language was accepted")
    await client.close_session()


asyncio.get_event_loop().run_until_complete(main(sys.argv[1]))
print("aiopyston: all checks passed")
