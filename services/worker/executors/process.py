"""Steps as processes of this machine, each in the sandbox."""

from services.worker.executors.commands import Commands
from services.worker.executors.executor import CannotRun, Environment, Job, Running
from services.worker.executors.orphans import Orphans
from services.worker.executors.sandboxes import Sandbox
from services.worker.executors.spawned import Spawned


class ProcessExecutor:
    """`path` is the steps' PATH."""

    def __init__(self, sandbox: Sandbox, orphans: Orphans, path: str) -> None:
        self.name = sandbox.name
        self.wraps = sandbox.wraps
        self._sandbox = sandbox
        self._commands = Commands(sandbox)
        self._orphans = orphans
        self._path = path

    async def start(self, job: Job) -> Running:
        inside, run = self._sandbox.inside(job.folders), job.step.config.run
        if run.user or job.step.config.container_limits:
            raise CannotRun("run.user and container_limits are kept in containers only: the step must name an image")
        environment = Environment(str(inside.home), str(inside.temp)).of(job.step, self._path)
        command = self._commands.find(run, environment, job.folders)
        try:
            return Spawned(command.argv, environment, command.directory, job.folders, self._sandbox, self._orphans, job.on_output)
        except OSError as error:
            raise CannotRun(f"run.path: `{run.path}` cannot be run: {error.strerror}") from error
