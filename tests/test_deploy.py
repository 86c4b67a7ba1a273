"""deploy/: what its files say is what the schemas, the server and the trainer know.

Kubernetes' schemas come with kubernetes-validate; those of JobSet, Kueue and Compose are in schemas/. Every check is
also run on a copy with a mistake in it, which it has to find.
"""

import copy
import functools
import importlib
import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jsonschema
import kubernetes_validate
import pytest
import yaml

from jaxgpt import __version__, cli
from jaxgpt.__main__ import VERBS
from jaxgpt.errors import EXIT_FAILED, EXIT_RESUME, EXIT_STORAGE, EXIT_USER, EXIT_WATCHDOG, UserError
from jaxgpt.inference.engine import Engine
from jaxgpt.serving.app import Options, build_app
from jaxgpt.serving.middleware import ALWAYS_OPEN, ServerMetrics
from jaxgpt.serving.served_model import ServeOptions
from jaxgpt.serving.server import check_options

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
CLUSTER = DEPLOY / "kubernetes"
OURS = {"JobSet", "ClusterQueue", "LocalQueue", "ResourceFlavor"}
OLDEST, NEWEST = "1.30", "1.37"  # of Kubernetes: the oldest with preStop's sleep, and the newest that has a schema
ENDING_SECONDS = 8  # after the drain: 5 for the engine's thread and 2 for uvicorn (serving/server.py); measured 7.2
SERVED = SimpleNamespace(engine=None, name="m", step=0)
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="renders with kubectl kustomize")


# ---------------------------------------------------------------- the files


def read(file: Path) -> list[dict]:
    return [document for document in yaml.safe_load_all(file.read_text(encoding="utf-8")) if document]


@functools.cache
def files() -> dict[str, dict]:
    """{"Deployment jaxgpt-serve": document} of all that kubectl is given as it is. Not to be changed."""
    found = {}
    for file in sorted(CLUSTER.glob("*/**/*.yaml")):
        for document in read(file):
            if file.name != "kustomization.yaml":
                name = f"{document['kind']} {document['metadata']['name']}"
                # The only thing that two folders may both bring is the same.
                assert found.setdefault(name, document) == document, f"two different {name}"
    return found


def rendered(folder: Path, options: list[str]) -> dict[str, dict]:
    """What `kubectl apply -k` would send for the server with these options."""
    shutil.copytree(CLUSTER, folder / "kubernetes")
    mine = folder / "kubernetes" / "mine"
    mine.mkdir()
    components = [f"../options/{option}" for option in options]
    (mine / "kustomization.yaml").write_text(json.dumps({"resources": ["../serve"], "components": components}))
    told = subprocess.run(["kubectl", "kustomize", str(mine)], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    return {f"{d['kind']} {d['metadata']['name']}": d for d in yaml.safe_load_all(told.stdout)}


def jobs_in(document: dict) -> list[dict]:
    """The Jobs that a document makes."""
    if document["kind"] == "Job":
        return [document]
    if document["kind"] != "JobSet":
        return []
    named = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "one"}}
    return [named | {"spec": each["template"]["spec"]} for each in document["spec"]["replicatedJobs"]]


def pods_in(documents: dict[str, dict]) -> dict[str, dict]:
    """{"Deployment jaxgpt-serve": the pod's spec}"""
    found = {name: d["spec"]["template"]["spec"] for name, d in documents.items() if d["kind"] == "Deployment"}
    return found | {name: job["spec"]["template"]["spec"] for name, d in documents.items() for job in jobs_in(d)}


def container_in(pod: dict) -> dict:
    (container,) = pod["containers"]
    return container


def option(words: list[str], name: str) -> str:
    (value,) = [word.split("=", 1)[1] for word in words if word.startswith(f"--{name}=")]
    return value


# ---------------------------------------------------------------- what may be wrong with them


def schema_of(name: str) -> dict:
    return json.loads((Path(__file__).parent / "schemas" / f"{name}.json").read_text(encoding="utf-8"))


def schema_problems(document: dict, version: str) -> list[str]:
    if document["kind"] in OURS:
        schema = schema_of(document["kind"].lower())
        found = [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(document)]
        if found or document["kind"] != "JobSet":
            return found
        return [problem for job in jobs_in(document) for problem in schema_problems(job, version)]
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [error.message]
    return []


def command_problems(words: list[str]) -> list[str]:
    """What `jaxgpt WORDS` would refuse before it reads anything: asked of the verb's own parser."""
    verb, *arguments = words
    if verb not in VERBS:
        return [f"no verb {verb}"]
    module = importlib.import_module(f"jaxgpt.{verb}")
    try:
        if verb == "serve":
            check_options(ServeOptions(**vars(module.parser().parse_args(arguments))))
            return []
        with mock.patch.object(cli, "config_from", side_effect=Parsed) as reading:
            code = module.main(arguments)  # as far as its parser goes
        return [f"exit code {code}"]
    except UserError as error:
        return [str(error)]
    except Parsed:
        (parsed,) = reading.call_args.args
    parsed.config = str(ROOT / Path(parsed.config).relative_to("/opt/jaxgpt"))
    try:
        cli.config_from(parsed)
    except UserError as error:
        return [str(error)]
    return []


class Parsed(Exception):
    """A verb has read its command line."""


def pod_problems(pod: dict) -> list[str]:
    """What a pod of ours must not do; see each line."""
    container = container_in(pod)
    security = pod["securityContext"] | container["securityContext"]
    found = []
    if security.get("runAsUser") == 0:
        # Raising the limit on locked memory takes this capability, which only root gets: TPUs, and nobody else.
        if "google.com/tpu" not in container["resources"]["limits"]:
            found.append("root")
        if security["capabilities"].get("add") != ["SYS_RESOURCE"]:
            found.append("root for nothing")
    elif not security.get("runAsNonRoot") or security["capabilities"].get("add"):
        found.append("may be root, or more than it needs")
    if (
        security.get("privileged")
        or security["allowPrivilegeEscalation"]
        or security["capabilities"]["drop"] != ["ALL"]
    ):
        found.append("privileges")
    if not security["readOnlyRootFilesystem"] or security["seccompProfile"]["type"] != "RuntimeDefault":
        found.append("may write to the image, or call anything")
    if pod.get("automountServiceAccountToken", True):
        found.append("holds a token of the cluster")
    written = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    if not {"/tmp", f"{image_environment()['HOME']}/.cache"} <= written:
        found.append("nowhere to write")
    if {mount["name"] for mount in container["volumeMounts"]} != {volume["name"] for volume in pod["volumes"]}:
        found.append("volumes and mounts differ")
    tag = container["image"].rpartition(":")[2] if ":" in container["image"] else "latest"
    if not tag.startswith(__version__):
        found.append("an image of another version, or one that changes")
    return found + command_problems(container["args"])


@functools.cache
def routes() -> set[str]:
    app, _ = build_app(SERVED, Options())
    return {route.path for route in app.routes}


def server_problems(pod: dict) -> list[str]:
    """What keeps a replica from being seen, or from ending in order."""
    container = container_in(pod)
    open_routes = routes() & set(ALWAYS_OPEN)  # a probe has no key
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    found = []
    for name, path in {"startupProbe": "/ready", "readinessProbe": "/ready", "livenessProbe": "/health"}.items():
        asked = container[name]["httpGet"]
        if asked["path"] != path or path not in open_routes or asked["port"] not in ports:
            found.append(name)
    if list(ports.values()) != [int(option(container["args"], "port"))]:
        found.append("the port")
    asleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    drained = asleep + float(option(container["args"], "drain-seconds")) + ENDING_SECONDS
    if not pod["terminationGracePeriodSeconds"] > drained:
        found.append(f"killed after {pod['terminationGracePeriodSeconds']} s, but it ends after {drained} s")
    return found


def disk_problems(documents: dict[str, dict]) -> list[str]:
    """What keeps replicas from their model: a disk of one node is read on that node alone, and drained in one go."""
    pod, found = pods_in(documents)["Deployment jaxgpt-serve"], []
    claim = documents.get("PersistentVolumeClaim jaxgpt-model")
    on_one_node = claim is not None and claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    rules = pod.get("affinity", {}).get("podAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution", [])
    if [rule["topologyKey"] for rule in rules] != ["kubernetes.io/hostname"] * on_one_node:
        found.append("replicas where the disk is not" if on_one_node else "all replicas on one node")
    if ("PodDisruptionBudget jaxgpt-serve" in documents) == on_one_node:
        found.append("a node that can never be drained" if on_one_node else "all replicas drained at once")
    return found


def served() -> dict[str, dict]:
    """The documents of the server without any option, as they are in the files."""
    names = read(CLUSTER / "serve" / "kustomization.yaml")[0]["resources"]
    documents = [document for name in names for document in read(CLUSTER / "serve" / name)]
    return {f"{document['kind']} {document['metadata']['name']}": document for document in documents}


def image_environment() -> dict[str, str]:
    """The ENV of the image's last stage."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").split("\nFROM ")[-1]
    return dict(word.split("=", 1) for line in re.findall(r"^ENV (.*)$", text, re.M) for word in line.split())


# ---------------------------------------------------------------- Kubernetes


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_document_fits_its_schema(version):
    documents = files()
    assert {d["kind"] for d in documents.values()} >= OURS | {"Deployment", "Service", "Job", "PodDisruptionBudget"}
    assert {name: found for name, d in documents.items() if (found := schema_problems(d, version))} == {}


@pytest.mark.parametrize(
    "name, change",
    [
        ("Deployment jaxgpt-serve", lambda d: d["spec"].update(strategi={})),
        ("Deployment jaxgpt-serve", lambda d: container_in(d["spec"]["template"]["spec"]).update(comand=[])),
        ("HorizontalPodAutoscaler jaxgpt-serve", lambda d: d["spec"].update(maxReplicas="many")),
        ("PodDisruptionBudget jaxgpt-serve", lambda d: d["spec"].update(maxUnavailabel=1)),
        ("JobSet gpt2-124m", lambda d: d["spec"]["failurePolicy"].update(maxRestart=1)),
        ("JobSet gpt2-124m", lambda d: d["spec"]["failurePolicy"]["rules"][0].update(action="StartAnew")),
        ("JobSet gpt2-124m", lambda d: jobs_in(d)[0]["spec"].update(backofLimit=1)),
        ("Job gpt2-124m-gpu", lambda d: d["spec"]["podFailurePolicy"]["rules"][0].pop("action")),
        ("ClusterQueue tpu", lambda d: d["spec"]["resourceGroups"][0].update(covered=[])),
        ("LocalQueue tpu", lambda d: d["spec"].update(clusterQueues=["tpu"])),
        ("ResourceFlavor gpu", lambda d: d["spec"].update(nodeLabels=["a"])),
    ],
)
def test_a_mistake_in_a_document_is_refused(name, change):
    document = copy.deepcopy(files()[name])
    assert schema_problems(document, NEWEST) == []
    change(document)
    assert schema_problems(document, NEWEST) != []


def test_no_pod_holds_more_than_it_needs():
    image = yaml.safe_load((CLUSTER / "serve" / "kustomization.yaml").read_text(encoding="utf-8"))["images"][0]
    pods = copy.deepcopy(pods_in(files()))
    container_in(pods["Deployment jaxgpt-serve"])["image"] = f"{image['newName']}:{image['newTag']}"
    assert len(pods) == 5
    assert {name: found for name, pod in pods.items() if (found := pod_problems(pod))} == {}
    assert server_problems(pods["Deployment jaxgpt-serve"]) == []


@needs_kubectl
@pytest.mark.parametrize(
    "options", [[], ["gpu"], ["tpu", "many-nodes"], ["spot"], ["many-nodes"], ["bucket"], ["gpu", "spot", "bucket"]]
)
def test_the_server_with_any_options_fits_the_schemas_and_ends_in_time(options, tmp_path):
    documents = rendered(tmp_path, options)
    for name, document in documents.items():
        assert (name, schema_problems(document, OLDEST)) == (name, [])
    pod = pods_in(documents)["Deployment jaxgpt-serve"]
    assert pod_problems(pod) == [] == server_problems(pod)
    args, limits = container_in(pod)["args"], container_in(pod)["resources"]["limits"]
    assert ("nvidia.com/gpu" in limits) == ("gpu" in options)
    assert option(args, "weights") == ("bfloat16" if {"gpu", "tpu"} & set(options) else "float32")
    assert ("PersistentVolumeClaim jaxgpt-model" in documents) == ("bucket" not in options)
    assert disk_problems(documents) == []
    assert len(pod.get("tolerations", [])) == len({"gpu", "tpu", "spot"} & set(options))
    # Google's Spot nodes give 15 s, whatever a pod asks for.
    assert ("spot" not in options) or pod["terminationGracePeriodSeconds"] <= 15


SERVER, SLICE = "Deployment jaxgpt-serve", "JobSet gpt2-124m"


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["PersistentVolumeClaim jaxgpt-model"]["spec"].update(accessModes=["ReadWriteMany"]),
        lambda d: d[SERVER]["spec"]["template"]["spec"].pop("affinity"),
        lambda d: d.update({"PodDisruptionBudget jaxgpt-serve": {"kind": "PodDisruptionBudget"}}),
    ],
)
def test_replicas_find_their_model_on_a_cluster_that_only_has_disks_of_one_node(change):
    documents = served()
    assert disk_problems(documents) == []
    change(documents)
    assert disk_problems(documents) != []


@pytest.mark.parametrize(
    "name, change",
    [
        (SERVER, lambda pod, one: pod["securityContext"].update(runAsUser=0)),
        (SERVER, lambda pod, one: pod["securityContext"].pop("runAsNonRoot")),
        (SERVER, lambda pod, one: one["securityContext"].update(readOnlyRootFilesystem=False)),
        (SERVER, lambda pod, one: one["volumeMounts"].pop()),
        (SERVER, lambda pod, one: one.update(image="registry.example.com/jaxgpt")),
        (SERVER, lambda pod, one: one.update(image="jaxgpt:latest")),
        (SERVER, lambda pod, one: one["args"].append("--slot=4")),
        (SERVER, lambda pod, one: one["args"].append("--weights=float61")),
        (SERVER, lambda pod, one: one["args"].append("everything")),
        (SERVER, lambda pod, one: one["startupProbe"]["httpGet"].update(path="/health")),
        (SERVER, lambda pod, one: one["livenessProbe"]["httpGet"].update(path="/healthz")),
        (SERVER, lambda pod, one: one["ports"][0].update(containerPort=8080)),
        (SERVER, lambda pod, one: one["lifecycle"]["preStop"]["sleep"].update(seconds=23)),
        (SERVER, lambda pod, one: pod.update(terminationGracePeriodSeconds=48)),
        (SLICE, lambda pod, one: one["args"].append("--train.max_step=5")),
        (SLICE, lambda pod, one: one["args"].append("--mesh.distributed=perhaps")),
        (SLICE, lambda pod, one: one["securityContext"]["capabilities"].update(add=["SYS_ADMIN"])),
        (SLICE, lambda pod, one: one["securityContext"].update(privileged=True)),
    ],
)
def test_a_mistake_in_a_pod_is_found(name, change):
    pod = copy.deepcopy(pods_in(files())[name])
    container_in(pod)["image"] = "jaxgpt:0.1.0"
    check = lambda: pod_problems(pod) + (server_problems(pod) if name == SERVER else [])
    assert check() == []
    change(pod, container_in(pod))
    assert check() != []


def test_the_autoscaler_counts_what_the_server_reports():
    (metric,) = files()["HorizontalPodAutoscaler jaxgpt-serve"]["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    (rule,) = read(CLUSTER / "prometheus-adapter.yaml")[0]["rules"]["custom"]
    assert rule["name"]["as"] == name and re.match(r"\w+", rule["seriesQuery"])[0] == name
    assert f"# TYPE {name} gauge" in ServerMetrics(SERVED).text()[0].decode()
    assert isinstance(Engine.waiting, property)  # what it reads
    # It has to be read without a key, and one replica at least stays while another is drained.
    documents = files()
    args = container_in(pods_in(documents)[SERVER])["args"]
    assert "metrics" in args[args.index("--open") :]
    assert documents["HorizontalPodAutoscaler jaxgpt-serve"]["spec"]["minReplicas"] > 1


def test_the_services_and_budgets_mean_the_servers_pods():
    documents = files()
    labels = documents[SERVER]["spec"]["template"]["metadata"]["labels"]
    pod = pods_in(documents)[SERVER]
    selectors = [
        documents[SERVER]["spec"]["selector"]["matchLabels"],
        documents["Service jaxgpt-serve"]["spec"]["selector"],
        documents["PodDisruptionBudget jaxgpt-serve"]["spec"]["selector"]["matchLabels"],
        documents["NetworkPolicy jaxgpt-serve"]["spec"]["podSelector"]["matchLabels"],
        *(spread["labelSelector"]["matchLabels"] for spread in pod["topologySpreadConstraints"]),
        pod["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][0]["labelSelector"][
            "matchLabels"
        ],
    ]
    assert all(selector == labels for selector in selectors)
    assert documents["Service jaxgpt-serve"]["spec"]["ports"][0]["targetPort"] == container_in(pod)["ports"][0]["name"]
    claimed = pod["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert f"PersistentVolumeClaim {claimed}" in documents


# ---------------------------------------------------------------- training


def decision(document: dict, exit_code: int, disrupted: bool = False) -> str:
    """What JobSet 0.12 or a Job does when the trainer ends so, by their controllers' rules."""
    (job,) = jobs_in(document)
    for index, rule in enumerate(job["spec"]["podFailurePolicy"]["rules"]):
        if disrupted and rule.get("onPodConditions") == [{"type": "DisruptionTarget", "status": "True"}]:
            message = f"Pod default/one has condition DisruptionTarget matching FailJob rule at index {index}"
        elif exit_code in rule.get("onExitCodes", {}).get("values", []):
            assert rule["onExitCodes"]["containerName"] == container_in(job["spec"]["template"]["spec"])["name"]
            message = (
                f"Container train for pod default/one failed with exit code {exit_code} matching FailJob rule at index "
                f"{index}"
            )
        else:
            continue
        if document["kind"] == "Job":
            return rule["action"]
        for each in document["spec"]["failurePolicy"]["rules"]:
            patterns = each.get("onJobFailureMessagePatterns", [""])
            if "PodFailurePolicy" in each["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
                return each["action"]
    return "counted"


def test_only_what_a_restart_can_mend_is_restarted():
    for name in ("JobSet gpt2-124m", "JobSet gpt2-124m-2-slices"):
        document = files()[name]
        assert decision(document, EXIT_USER) == "FailJobSet"
        assert decision(document, EXIT_RESUME) == "RestartJobSetAndIgnoreMaxRestarts"
        assert decision(document, 143, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
        for code in (EXIT_FAILED, EXIT_STORAGE, EXIT_WATCHDOG, 137):
            assert decision(document, code) == "counted"
        assert document["spec"]["failurePolicy"]["maxRestarts"] > 0
    job = files()["Job gpt2-124m-gpu"]
    assert decision(job, EXIT_USER) == "FailJob"
    assert decision(job, EXIT_RESUME) == decision(job, 143, disrupted=True) == "Ignore"
    assert decision(job, EXIT_WATCHDOG) == "counted"


@pytest.mark.parametrize("name", ["JobSet gpt2-124m", "JobSet gpt2-124m-2-slices"])
def test_a_slice_is_asked_for_whole_and_its_batch_divides(name):
    documents = files()
    document = documents[name]
    (job,), slices = jobs_in(document), document["spec"]["replicatedJobs"][0]["replicas"]
    pod = pods_in(documents)[name]
    across, down = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = job["spec"]["parallelism"] * container_in(pod)["resources"]["limits"]["google.com/tpu"]
    assert chips == across * down and job["spec"]["completions"] == job["spec"]["parallelism"]
    args = container_in(pod)["args"]
    config = tomllib.loads((ROOT / option(args, "config").removeprefix("/opt/jaxgpt/")).read_text(encoding="utf-8"))
    rows = config["train"]["global_batch_size"]
    assert rows % (slices * chips * int(option(args, "train.per_device_train_batch_size"))) == 0
    # Its queue is there, leads to nodes of this kind, and may have so many chips.
    (queue,) = [documents[f"LocalQueue {document['metadata']['labels']['kueue.x-k8s.io/queue-name']}"]]
    (group,) = documents[f"ClusterQueue {queue['spec']['clusterQueue']}"]["spec"]["resourceGroups"]
    assert group["coveredResources"] == list(container_in(pod)["resources"]["limits"])  # or Kueue never lets it in
    assert group["flavors"][0]["resources"][0]["nominalQuota"] >= slices * chips
    labels = documents[f"ResourceFlavor {group['flavors'][0]['name']}"]["spec"]["nodeLabels"]
    assert labels.items() <= pod["nodeSelector"].items()
    environment = {each["name"]: each["value"] for each in container_in(pod)["env"]}
    assert environment["JAX_COORDINATOR_PORT"] == "8476"
    assert "exec python -m jaxgpt" in container_in(pod)["command"][2]  # or a shell gets the signal
    assert "alpha.jobset.sigs.k8s.io/exclusive-topology" in document["metadata"]["annotations"]
    assert document["spec"]["failurePolicy"]["restartStrategy"] == "BlockingRecreate"


@needs_kubectl
@pytest.mark.parametrize("file", ["prepare", "tpu-slices", "gpu"])
def test_the_kustomization_of_training_puts_image_and_buckets_into_every_file(file, tmp_path):
    shutil.copytree(CLUSTER / "train", tmp_path / "train")
    mine = tmp_path / "train" / "kustomization.yaml"
    text = mine.read_text(encoding="utf-8").replace("- prepare.yaml", f"- {file}.yaml")
    for name, own in {
        "newName: registry.example.com/": "newName: x.y/",
        "=YOUR-DATA": "=d",
        "=YOUR-RUNS": "=r",
    }.items():
        assert name in text
        text = text.replace(name, own)
    mine.write_text(text, encoding="utf-8")
    told = subprocess.run(["kubectl", "kustomize", str(tmp_path / "train")], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    documents = {f"{d['kind']} {d['metadata']['name']}": d for d in yaml.safe_load_all(told.stdout)}
    assert {"ServiceAccount jaxgpt", "ClusterQueue tpu"} < documents.keys()
    assert "ConfigMap buckets" not in documents
    (pod,) = pods_in(documents).values()
    assert container_in(pod)["image"].startswith("x.y/jaxgpt:0.1.0-")
    buckets = [volume["csi"]["volumeAttributes"]["bucketName"] for volume in pod["volumes"] if "csi" in volume]
    assert sorted(buckets) == {"prepare": ["d-BUCKET"], "gpu": []}.get(file, ["d-BUCKET", "r-BUCKET"])


def test_data_is_prepared_as_it_will_be_looked_for():
    pods = pods_in(files())
    told = lambda name: [word for word in container_in(pods[name])["args"] if word.startswith(("--config", "--data."))]
    assert told("Job gpt2-124m-prepare") == told("JobSet gpt2-124m") == told("JobSet gpt2-124m-2-slices")
    bucket = lambda name: [
        volume["csi"]["volumeAttributes"]["bucketName"] for volume in pods[name]["volumes"] if volume["name"] == "data"
    ]
    assert bucket("Job gpt2-124m-prepare") == bucket("JobSet gpt2-124m")


def test_two_slices_are_one_slice_but_for_four_things():
    one, two = files()["JobSet gpt2-124m"], copy.deepcopy(files()["JobSet gpt2-124m-2-slices"])
    two["metadata"]["name"] = one["metadata"]["name"]
    assert two["spec"]["replicatedJobs"][0]["replicas"] == 2
    two["spec"]["replicatedJobs"][0]["replicas"] = 1
    pod = jobs_in(two)[0]["spec"]["template"]["spec"]
    assert (pod.pop("hostNetwork"), pod.pop("dnsPolicy")) == (True, "ClusterFirstWithHostNet")
    args = container_in(pod)["args"]
    args[args.index("--workdir=/runs/gpt2_124m_2_slices")] = "--workdir=/runs/gpt2_124m"
    assert one == two


# ---------------------------------------------------------------- the image and Compose


def test_the_image_is_built_from_extras_that_exist_and_never_runs_as_root():
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    cases = re.search(r"case .*?esac", text, re.S)[0]
    devices = re.findall(r"^ +([a-z0-9|]+)\) extras", cases, re.M)
    assert devices == ["cpu", "cuda12|cuda13|tpu"] and {"serve", "cuda12", "cuda13", "tpu"} <= set(extras)
    last = text.split("\nFROM ")[-1]
    assert re.findall(r"^USER (.*)$", last, re.M) == ["10001:10001"] and "useradd --uid 10001" in last
    assert f'image.version="{__version__}"' in last
    assert "\nSTOPSIGNAL SIGTERM\n" in last and "/health'" in last
    start = [json.loads(re.search(rf"^{word} (\[.*\])$", last, re.M)[1]) for word in ("ENTRYPOINT", "CMD")]
    assert start[0] == ["python", "-m", "jaxgpt"] and command_problems(start[1]) == []
    # What is copied may be sent to the builder, and nothing else is.
    sent = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    copied = {word for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.M) for word in line.split()}
    assert {line[1:] for line in sent if line.startswith("!")} == copied and "*" in sent
    assert all((ROOT / name).exists() for name in copied)


def compose_problems(document: dict) -> list[str]:
    found = [error.message for error in jsonschema.Draft7Validator(schema_of("compose")).iter_errors(document)]
    if found:
        return found
    service = document["services"]["serve"]
    if not service["read_only"] or service["cap_drop"] != ["ALL"] or service["user"] != "10001:10001":
        found.append("privileges")
    if not all(port.startswith("127.0.0.1:") for port in service["ports"]):
        found.append("reached from other machines without TLS")
    drained = float(option(service["command"], "drain-seconds")) + ENDING_SECONDS
    if not float(service["stop_grace_period"].removesuffix("s")) > drained:
        found.append("killed in the middle of its answers")
    if "--open=page" not in service["command"]:
        found.append("a page that nobody sees, as a browser brings no key")
    return found + command_problems(service["command"])


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["services"]["serve"].update(readonly=True),
        lambda d: d["services"]["serve"].update(user="0:0"),
        lambda d: d["services"]["serve"].update(ports=["8000:8000"]),
        lambda d: d["services"]["serve"].update(stop_grace_period="38s"),
        lambda d: d["services"]["serve"]["command"].append("--slot=1"),
        lambda d: d["services"]["serve"]["command"].remove("--open=page"),
    ],
)
def test_compose_fits_its_schema_and_a_mistake_is_found(change):
    (document,) = read(DEPLOY / "compose.yaml")
    assert compose_problems(document) == []
    assert (DEPLOY / document["services"]["serve"]["build"]["context"]).resolve() == ROOT
    change(document)
    assert compose_problems(document) != []


# ---------------------------------------------------------------- the guide


def test_the_guide_names_files_flags_and_figures_that_exist():
    text = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    figures = ServerMetrics(SERVED).text()[0].decode()
    known = set(re.findall(r"^# TYPE (\w+) ", figures, re.M)) | {"jaxgpt_serve"}
    for name in set(re.findall(r"\bjaxgpt_[a-z_]+", text)):
        assert name in known or name.removesuffix("_bucket") in known, name
    yours = {"deploy/model", "deploy/keys.txt", "deploy/kubernetes/NAME/kustomization.yaml"}
    for path in set(re.findall(r"\bdeploy/[\w./-]+\w", text)):
        assert (ROOT / path).exists() or path in yours, path
    flags = {o for action in importlib.import_module("jaxgpt.serve").parser()._actions for o in action.option_strings}
    for block in re.findall(r"python -m jaxgpt\.serve ((?:[^\n`]|\\\n)*)", text):
        assert set(re.findall(r"--[a-z][a-z-]*", block)) <= flags, block
