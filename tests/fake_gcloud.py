"""A gcloud that plays Google Cloud on one machine, from a plan, in a time of its own.

`make_world(folder, plan)` puts gcloud and the other commands that the scripts call (sleep, date, tmux, uv, gcsfuse,
mountpoint) into folder/bin. `sleep` moves the clock of the folder; `date +%s` and the plan read it. Commands for
workers really run, with `sh -c`, each worker in a home folder of its own. Flags that the real gcloud does not have
are refused as it does. What is there at the end is in `load(f"{folder}/state")["things"]`, and what was called in
`calls(folder)`.

A plan, all of it optional:
    zone            where there are TPUs
    bucket          the only bucket that there is, my-bucket by default
    workers         hosts of a node
    qr, vm, mig     for each creation the schedule of its state: [[[seconds, state], ...], ...]; the last is used again
    train           for each start [seconds, exit code], lists where workers differ; "vanish" leaves no exit code
    fail            errors: [{match (words of a call), error, times, skip, code}, ...]
    lose            words of remote commands whose first answer is lost
    there           things from before
    mig_errors      what list-errors says
    hurry           how many seconds pass in a second's sleep, 4 by default
"""

import fcntl
import marshal  # json would take as long to import as all the rest, at each of a thousand calls
import os
import sys

# The flags of each command, from Google's reference: with a value, without, and how many words are positional.
LIST = "limit filter sort-by page-size uri"
SSH = "ssh-flag ssh-key-file strict-host-key-checking zone ssh-key-expiration ssh-key-expire-after"
NODE = (
    "zone boot-disk data-disk description labels metadata metadata-from-file network range scopes service-account "
    "subnetwork tags accelerator-type topology type"
)
COMMANDS = {
    "compute tpus tpu-vm create": (NODE + " version queue-count", "async internal-ips preemptible reserved spot"),
    "compute tpus tpu-vm describe": ("zone", ""),
    "compute tpus tpu-vm delete": ("zone", "async"),
    "compute tpus tpu-vm ssh": (SSH + " worker command output-directory batch-size", "internal-ip plain dry-run"),
    "compute tpus tpu-vm scp": (SSH + " worker scp-flag batch-size", "internal-ip plain dry-run recurse compress"),
    "compute tpus queued-resources create": (
        NODE + " runtime-version node-id node-count node-prefix valid-after-duration valid-until-duration",
        "async internal-ips guaranteed reserved spot shielded-secure-boot",
    ),
    "compute tpus queued-resources describe": ("zone", ""),
    "compute tpus queued-resources delete": ("zone", "async force"),
    "compute instance-templates create": (
        "machine-type image image-project image-family maintenance-policy boot-disk-size boot-disk-type scopes "
        "provisioning-model instance-termination-action max-run-duration metadata network subnet tags "
        "service-account region instance-template-region reservation reservation-affinity",
        "no-address",
    ),
    "compute instance-templates delete": ("region", ""),
    "compute resource-policies create workload-policy": (
        "type accelerator-topology accelerator-topology-mode max-topology-distance description region",
        "",
    ),
    "compute resource-policies delete": ("region", ""),
    "compute instance-groups managed create": (
        "size template base-instance-name default-action-on-vm-failure description zone zones region workload-policy "
        "target-size-policy-mode target-distribution-shape instance-redistribution-type",
        "",
    ),
    "compute instance-groups managed delete": ("zone region", ""),
    "compute instance-groups managed list-instances": ("zone region " + LIST, ""),
    "compute instance-groups managed list-errors": ("zone region " + LIST, ""),
    "compute ssh": (SSH + " command container", "internal-ip plain dry-run tunnel-through-iap"),
    "compute scp": (SSH + " scp-flag port", "internal-ip plain dry-run tunnel-through-iap recurse compress"),
    "config get-value": ("", ""),
    "storage ls": ("", "recursive"),
    "storage cat": ("range", "display-url"),
    "storage cp": ("", "recursive"),
}
QUEUED = COMMANDS["compute tpus queued-resources create"]
COMMANDS["alpha compute tpus queued-resources create"] = (QUEUED[0] + " provisioning-model max-run-duration", QUEUED[1])
EVERYWHERE = ("project", "format", "verbosity", "account", "configuration"), ("quiet",)
REQUIRED = {
    "compute tpus tpu-vm create": "zone version accelerator-type",
    "compute tpus queued-resources create": "zone runtime-version accelerator-type",
    "alpha compute tpus queued-resources create": "zone runtime-version accelerator-type",
    "compute instance-templates create": "machine-type",
    "compute resource-policies create workload-policy": "type region",
    "compute instance-groups managed create": "size template",
}
CALL_SECONDS = 2  # that a call takes, in the time of the folder
RUNTIMES = {"v5litepod": "v2-alpha-tpuv5-lite", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}


class Refused(Exception):
    def __init__(self, message: str, code: int = 1):
        self.message, self.code = message, code


def make_world(folder, plan: dict) -> dict[str, str]:
    """Everything the scripts need in `folder`; the environment to run them in."""
    commands = {
        "sleep": 'echo $(($(cat "$FAKE/clock") + $1 * HURRY)) >"$FAKE/clock.$$" && mv "$FAKE/clock.$$" "$FAKE/clock"',
        "date": '[ "$1" = +%s ] && cat "$FAKE/clock"',
        "gcloud": f'exec {sys.executable} -ISEc {START!r} "$@"',
        "tmux": TMUX,
        "uv": UV,
        "gcsfuse": GCSFUSE,
        "mountpoint": '[ -L "$2" ]',
        "sudo": 'exec "$@"',
        "curl": "exit 6",  # there is no network
    }
    commands["sleep"] = commands["sleep"].replace("HURRY", str(plan.get("hurry", 4)))
    for name in ("bin", "homes", "bucket"):
        (folder / name).mkdir(parents=True)
    for name, text in commands.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    (folder / "clock").write_text("1000000\n")
    dump(plan, f"{folder}/plan")
    there = {name: {"since": 0, "serial": 99} | facts for name, facts in plan.get("there", {}).items()}
    dump({"things": there, "made": {}, "failed": {}, "starts": []}, f"{folder}/state")
    (folder / "calls").touch()
    return {"PATH": f"{folder}/bin:/usr/bin:/bin", "FAKE": str(folder), "HOME": str(folder), "LANG": "C.UTF-8"}


# As a module, whose compiled form Python keeps: as a script it would be compiled at each call.
HERE = os.path.dirname(os.path.abspath(__file__))
START = f"import sys; sys.path.append('{HERE}'); import fake_gcloud; fake_gcloud.main()"


def load(path: str):
    with open(path, "rb") as file:
        return marshal.load(file)


def dump(value, path: str) -> None:
    with open(path + ".new", "wb") as file:
        marshal.dump(value, file)
    os.replace(path + ".new", path)


def calls(folder) -> list[list[str]]:
    """The words of each call of gcloud."""
    found = []
    with open(f"{folder}/calls", "rb") as file:
        while True:
            try:
                found.append(marshal.load(file))
            except EOFError:
                return found


TMUX = """verb=$1 name=jaxgpt
mkdir -p "$HOME/.tmux"
case $verb in
    new-session) [ "$2 $3 $4" = "-d -s $name" ] && printf '%s' "$5" >"$HOME/.tmux/$name" ;;
    has-session) [ -f "$HOME/.tmux/$name" ] ;;
    kill-session) rm "$HOME/.tmux/$name" ;;
    send-keys) [ "$2 $3 $4" = "-t $name C-c" ] && [ -f "$HOME/.tmux/$name" ] && touch "$HOME/.tmux/interrupted" ;;
    *) exit 1 ;;
esac"""

GCSFUSE = """for folder in "$@"; do
    [ "$folder" != no-bucket ] || exit 1
done
rm -rf "$folder"
ln -s "$FAKE/bucket" "$folder" """

UV = """[ "$1" != --version ] || { sed -n 's/^UV=\\([0-9.]*\\).*/uv \\1 (of 2026)/p' "$HOME/jaxgpt-worker.sh" && exit; }
echo "uv $*" >>"$HOME/uv-calls"
[ "$1" = venv ] || exit 0
for folder in "$@"; do :; done
mkdir -p "$folder/bin"
cat >"$folder/bin/python" <<'END'
#!/bin/sh
printf '%s\\n' "$@" >"$HOME/arguments"
env | grep -E '^(JAX|JAXGPT)_' | sort >"$HOME/environment"
echo "trained" >>runs/trained
echo "the log of $JAXGPT_PROCESS_ID"
exit "$FAKE_CODE"
END
chmod +x "$folder/bin/python" """


# ---------------------------------------------------------------- the world


class World:
    """The state of the cloud: one dictionary, kept in a file."""

    def __init__(self, folder: str):
        self.folder = folder
        self.plan = load(f"{folder}/plan")
        with open(f"{folder}/clock") as file:
            self.now = int(file.read())
        self.state = load(f"{folder}/state")
        self.things = self.state["things"]

    def pass_time(self, seconds: int) -> None:
        self.now += seconds
        with open(f"{self.folder}/clock.new", "w") as file:
            file.write(f"{self.now}\n")
        os.replace(f"{self.folder}/clock.new", f"{self.folder}/clock")

    def save(self) -> None:
        dump(self.state, f"{self.folder}/state")

    def nth(self, kind: str, default: list, count: int) -> list:
        given = self.plan.get(kind, [default])
        return given[min(count, len(given) - 1)]

    def make(self, kind: str, name: str, **facts) -> None:
        if f"{kind} {name}" in self.things:
            raise Refused(f"ALREADY_EXISTS: Resource '{name}' already exists")
        count = self.state["made"].get(kind, 0)
        self.state["made"][kind] = count + 1
        ready = {"qr": "ACTIVE", "vm": "READY", "mig": "RUNNING"}.get(kind, "")
        schedule = self.nth(kind, [[0, ready]], count)
        self.things[f"{kind} {name}"] = {"since": self.now, "schedule": schedule, "serial": count, **facts}

    def get(self, kind: str, name: str) -> dict:
        if f"{kind} {name}" not in self.things:
            raise Refused(f"NOT_FOUND: Resource 'projects/p/locations/z/{kind}/{name}' was not found")
        return self.things[f"{kind} {name}"]

    def status(self, thing: dict) -> str:
        return [state for seconds, state in thing["schedule"] if self.now - thing["since"] >= seconds][-1]

    def node(self, name: str) -> tuple[str, dict]:
        """The state of a TPU VM, by itself or of a queued resource, and the thing it belongs to."""
        if f"vm {name}" in self.things:
            thing = self.things[f"vm {name}"]
            return self.status(thing), thing
        for thing in self.things.values():
            if name in thing.get("nodes", ()):
                state, _, of_node = self.status(thing).partition("/")
                if of_node or state == "ACTIVE":
                    if of_node == "GONE":
                        break
                    return of_node or "READY", thing
                if state.startswith("SUSPEND"):
                    return "PREEMPTED", thing
        raise Refused(f"NOT_FOUND: Resource 'nodes/{name}' was not found")

    def instances(self, thing: dict) -> list[list[str]]:
        """[name, status] of the machines of a group; "RUNNING:2" says it of two, the others are not there."""
        state, _, number = self.status(thing).partition(":")
        if state == "NONE":
            return []
        names = [f"{thing['base']}-{letter}k{letter}z" for letter in "dbca"[: thing["size"]]]
        others = "RUNNING" if state not in ("RUNNING", "PROVISIONING", "STAGING") else "PROVISIONING"
        number = int(number or len(names))
        return [[name, state if n < number else others] for n, name in enumerate(names)]


def injected(world: World, line: str) -> None:
    for n, fault in enumerate(world.plan.get("fail", ())):
        if fault["match"] not in line:
            continue
        seen = world.state["failed"].get(str(n), 0)
        world.state["failed"][str(n)] = seen + 1
        if fault.get("skip", 0) <= seen < fault.get("skip", 0) + fault.get("times", 10**9):
            raise Refused(fault["error"], fault.get("code", 1))


def parse(words: list[str]) -> tuple[str, list[str], dict[str, str]]:
    positional = [word for word in words if not word.startswith("--")]
    command = max((c for c in COMMANDS if positional[: len(c.split())] == c.split()), key=len, default=None)
    if command is None:
        raise Refused(f"Invalid choice: '{' '.join(positional[:4])}'.", 2)
    valued, bare = COMMANDS[command]
    flags = {}
    for word in words:
        name, equals, value = word[2:].partition("=")
        if not word.startswith("--"):
            continue
        if name not in ((*valued.split(), *EVERYWHERE[0]) if equals else (*bare.split(), *EVERYWHERE[1])):
            raise Refused(f"unrecognized arguments: {word}", 2)
        flags[name] = value
    for name in REQUIRED.get(command, "").split():
        if not flags.get(name):
            raise Refused(f"argument --{name}: Must be specified.", 2)
    return command, positional[len(command.split()) :], flags


def main() -> None:
    sys.exit(answer_call(sys.argv[1:]))


def answer_call(words: list[str]) -> int:
    folder = os.environ["FAKE"]
    with open(f"{folder}/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(f"{folder}/calls", "ab") as file:
            marshal.dump(words, file)
        world = World(folder)
        world.pass_time(CALL_SECONDS)
        try:
            command, names, flags = parse(words)
            injected(world, " ".join(words))
            zone = world.plan.get("zone", "us-east5-b")
            if flags.get("zone", zone) != zone:
                where = f"'locations/{flags['zone']}' (or it may not exist)"
                raise Refused(f"PERMISSION_DENIED: Permission denied on {where}.")
            what = command.removeprefix("alpha ").removeprefix("compute ").replace("-", "_").replace(" ", "_")
            function = globals()["do_" + what]
            answer = function(world, names, flags)
        except Refused as refused:
            print(f"ERROR: (gcloud.{'.'.join(words[:4])}) {refused.message}", file=sys.stderr)
            return refused.code
        finally:
            world.save()
    if callable(answer):  # outside of the lock: workers run side by side
        return answer()
    if answer:
        print(answer)
    return 0


# ---------------------------------------------------------------- the TPU API


def do_tpus_tpu_vm_create(world, names, flags):
    check_runtime(flags["accelerator-type"], flags["version"])
    world.make("vm", names[0])


def do_tpus_tpu_vm_describe(world, names, flags):
    state, _ = world.node(names[0])
    assert flags["format"] == 'value[separator=" "](state,networkEndpoints[].ipAddress)', flags
    addresses = [f"10.0.{len(names[0])}.{n}" for n in range(world.plan.get("workers", 1))]
    return f"{state} {';'.join(addresses)}"


def do_tpus_tpu_vm_delete(world, names, flags):
    _, thing = world.node(names[0])
    if "nodes" in thing:
        raise Refused("FAILED_PRECONDITION: node belongs to a queued resource")
    del world.things[f"vm {names[0]}"]


def do_tpus_queued_resources_create(world, names, flags):
    check_runtime(flags["accelerator-type"], flags["runtime-version"])
    if ("node-id" in flags) == ("node-count" in flags):
        raise Refused("argument --node-id: Exactly one of (--node-id | --node-count : --node-prefix).", 2)
    if (model := flags.get("provisioning-model")) is not None:
        longest = flags.get("max-run-duration", "")
        if model != "flex-start" or not longest.endswith("h") or int(longest[:-1]) > 168 or "spot" in flags:
            raise Refused("INVALID_ARGUMENT: flex-start runs for at most 7 days, and is not spot")
        if flags["accelerator-type"].split("-")[0] not in ("v5litepod", "v6e"):
            raise Refused("INVALID_ARGUMENT: flex-start is for v5e and v6e")
    prefix = flags.get("node-prefix", names[0])
    nodes = [f"{prefix}-{n}" for n in range(int(flags.get("node-count", 0)))] or [flags["node-id"]]
    if f"vm {nodes[0]}" in world.things:
        raise Refused(f"ALREADY_EXISTS: node {nodes[0]} already exists")
    world.make("qr", names[0], nodes=nodes)


def do_tpus_queued_resources_describe(world, names, flags):
    assert flags["format"] == 'value[separator=" "](state.state,state.failedData.error.message)', flags
    state, _, message = world.status(world.get("qr", names[0])).partition("/")
    return f"{state} {message if state == 'FAILED' else ''}"


def do_tpus_queued_resources_delete(world, names, flags):
    thing = world.get("qr", names[0])
    if world.status(thing).startswith("ACTIVE") and "force" not in flags:
        raise Refused("FAILED_PRECONDITION: Queued resource has nodes; use --force")
    del world.things[f"qr {names[0]}"]


def check_runtime(kind: str, version: str) -> None:
    generation = kind.split("-")[0]
    if generation not in ("v2", "v3", "v4", *RUNTIMES):
        raise Refused(f"NOT_FOUND: accelerator type {kind} not found")
    if version != RUNTIMES.get(generation, "tpu-ubuntu2204-base"):
        raise Refused(f"INVALID_ARGUMENT: runtime version {version} does not fit {kind}")


# ---------------------------------------------------------------- Compute Engine


def do_instance_templates_create(world, names, flags):
    new = flags["machine-type"].startswith("tpu7x")
    if not new and not flags["machine-type"].startswith(("ct5p-", "ct6e-")):
        raise Refused("INVALID_ARGUMENT: MIGs serve v5p, v6e and TPU7x")
    if new and not flags.get("boot-disk-type", "").startswith("hyperdisk"):
        raise Refused("INVALID_ARGUMENT: tpu7x machines take hyperdisks only")
    if flags["image-family"].endswith("tpu7x") != new:
        raise Refused("INVALID_ARGUMENT: the image does not fit the machine")
    world.make("template", names[0], chips=int(flags["machine-type"].split("-")[-1][:-1]))


def do_instance_templates_delete(world, names, flags):
    in_use(world, names[0], "template")
    world.get("template", names[0])
    del world.things[f"template {names[0]}"]


def do_resource_policies_create_workload_policy(world, names, flags):
    world.make("policy", names[0], topology=flags["accelerator-topology"], region=flags["region"])


def do_resource_policies_delete(world, names, flags):
    in_use(world, names[0], "policy")
    world.get("policy", names[0])
    del world.things[f"policy {names[0]}"]


def in_use(world, name, what):
    if any(thing.get(what) == name for thing in world.things.values()):
        raise Refused(f"The {what} resource '{name}' is already being used (resourceInUseByAnotherResource)")


def do_instance_groups_managed_create(world, names, flags):
    template, size, policy = world.get("template", flags["template"]), int(flags["size"]), flags.get("workload-policy")
    if size > 1:
        if not policy or flags.get("target-size-policy-mode") != "bulk":
            raise Refused("INVALID_ARGUMENT: MIGs with TPU accelerator topology require BULK mode")
        parts = policy.split("/")
        if parts[:1] + parts[2:3] + parts[4:5] != ["projects", "regions", "resourcePolicies"] or not parts[1]:
            raise Refused("INVALID_ARGUMENT: The URL is malformed.")
        chips = 1
        for side in world.get("policy", parts[5])["topology"].split("x"):
            chips *= int(side)
        if chips != size * template["chips"]:
            raise Refused("INVALID_ARGUMENT: size does not fit the topology")
    facts = {"template": flags["template"], "policy": policy and policy.split("/")[-1]}
    world.make("mig", names[0], size=size, base=flags["base-instance-name"], **facts)


def do_instance_groups_managed_delete(world, names, flags):
    world.get("mig", names[0])
    del world.things[f"mig {names[0]}"]


def do_instance_groups_managed_list_instances(world, names, flags):
    assert flags["format"] == "value(instance.basename(),instanceStatus)", flags
    return "\n".join("\t".join(row) for row in world.instances(world.get("mig", names[0])))


def do_instance_groups_managed_list_errors(world, names, flags):
    world.get("mig", names[0])
    return world.plan.get("mig_errors", "")


def do_config_get_value(world, names, flags):
    return world.plan.get("project", "my-project")


# ---------------------------------------------------------------- the bucket


def in_bucket(world, url: str) -> str:
    bucket, _, key = url.removeprefix("gs://").partition("/")
    if bucket != world.plan.get("bucket", "my-bucket"):
        raise Refused(f"gs://{bucket} not found: 404.")
    return f"{world.folder}/bucket/{key}".rstrip("/")


def objects(world, urls: list[str]) -> list[str]:
    import glob  # takes half as long as all the rest, and few calls need it

    found = [path for url in urls for path in sorted(glob.glob(in_bucket(world, url)))]
    if not found:
        raise Refused("One or more URLs matched no objects.")
    return found


def do_storage_ls(world, names, flags):
    return "\n".join(objects(world, names))


def do_storage_cat(world, names, flags):
    answer = ""
    for path in objects(world, names):
        name = f"gs://{world.plan.get('bucket', 'my-bucket')}{path.removeprefix(world.folder + '/bucket')}"
        with open(path) as file:
            answer += (f"==> {name} <==\n" if "display-url" in flags else "") + file.read()
    return answer


def do_storage_cp(world, names, flags):
    *sources, target = names
    for source in objects(world, sources) if sources[0].startswith("gs://") else sources:
        to = in_bucket(world, target) if target.startswith("gs://") else target
        os.makedirs(to, exist_ok=True)
        command = ["cp", *(["-R"] if "recursive" in flags else []), source, to]
        if os.spawnvp(os.P_WAIT, "cp", command):
            raise Refused(f"{source} is a folder: --recursive")


# ---------------------------------------------------------------- on the workers


def do_tpus_tpu_vm_ssh(world, names, flags):
    state, thing = world.node(names[0])
    return on_worker(world, thing, state, names[0], int(flags["worker"]), flags["command"], faithful=False)


def do_tpus_tpu_vm_scp(world, names, flags):
    state, thing = world.node(names[-1].rstrip(":"))
    return copy(world, thing, state, names, int(flags["worker"]))


def machine(world, name):
    for thing in world.things.values():
        for machine_name, state in world.instances(thing) if "base" in thing else ():
            if machine_name == name:
                return thing, state.replace("RUNNING", "READY")
    raise Refused(f"Could not fetch resource: - The resource 'instances/{name}' was not found")


def do_ssh(world, names, flags):
    thing, state = machine(world, names[0])
    return on_worker(world, thing, state, names[0], 0, flags["command"], faithful=True)


def do_scp(world, names, flags):
    thing, state = machine(world, names[-1].rstrip(":"))
    return copy(world, thing, state, names, 0)


def home_of(world, thing, state, node, worker) -> str:
    """A folder that lives as long as the machine; as the real ssh, no answer where that is not running."""
    if state != "READY":
        raise Refused("[/usr/bin/ssh] exited with return code [255].", 255)
    kind = "mig" if "base" in thing else "qr" if "nodes" in thing else "vm"
    home = f"{world.folder}/homes/{kind}{thing['serial']}/{node}-{worker}"
    os.makedirs(home, exist_ok=True)
    return home


def copy(world, thing, state, names, worker):
    home = home_of(world, thing, state, names[-1].rstrip(":"), worker)
    for name in names[:-1]:
        with open(name, "rb") as source, open(f"{home}/{os.path.basename(name)}", "wb") as target:
            target.write(source.read())


def on_worker(world, thing, state, node, worker, command, faithful):
    home = home_of(world, thing, state, node, worker)
    if "base" in thing:  # a group of machines with one worker each
        process = sorted(name for name, _ in world.instances(thing)).index(node)
    else:
        process = thing.get("nodes", [node]).index(node) * world.plan.get("workers", 1) + worker
    environment = {
        "PATH": f"{world.folder}/bin:/usr/bin:/bin",
        "HOME": home,
        "FAKE": world.folder,
        "TPU_LOCKFILE": f"{home}/libtpu_lockfile",
    }
    start = command.partition(" start ")[2].partition(" ")[0]
    if start and start not in world.state["starts"]:
        world.state["starts"].append(start)
    finish_session(world, home, environment)

    def run() -> int:
        if not faithful:
            print("SSH: Attempting to connect to worker 0...", flush=True)
        lost = any(words in command for words in world.plan.get("lose", ())) and not os.path.exists(f"{home}/lost")
        code = shell(command, home, environment, silent=lost)
        if start and os.path.exists(f"{home}/.tmux/jaxgpt"):  # how and when it will end
            seconds, end = world.nth("train", [30, 0], world.state["starts"].index(start))
            seconds, end = (each[process] if isinstance(each, list) else each for each in (seconds, end))
            dump([world.now + seconds, end], f"{home}/.tmux/end")
        if lost:  # done, but nobody hears of it
            dump(True, f"{home}/lost")
            return 255
        # gcloud compute ssh ends as the command did; tpu-vm ssh does not in every version.
        return code if faithful else 0

    return run


def finish_session(world, home, environment) -> None:
    """Let the run in the worker's tmux come to its end, if its time is over."""
    session = f"{home}/.tmux/jaxgpt"
    if not os.path.exists(session):
        return
    with open(session) as file:
        command = file.read()
    end, code = load(f"{home}/.tmux/end")
    interrupted = os.path.exists(f"{home}/.tmux/interrupted")
    if world.now < end and not interrupted:
        return
    for name in ("jaxgpt", "interrupted"):
        if os.path.exists(f"{home}/.tmux/{name}"):
            os.remove(f"{home}/.tmux/{name}")
    if code != "vanish":
        shell(command, home, environment | {"FAKE_CODE": str(42 if interrupted else code)})


def shell(command, home, environment, silent=False) -> int:
    child = os.fork()
    if child == 0:
        os.chdir(home)
        if silent:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.execve("/bin/sh", ["sh", "-c", command], environment)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
