//! ztunnel as a peer: the same place and the same controller, its own node proxy.
//!
//! The pods' traffic is handed to it as Istio's CNI agent does, by iptables in each pod's namespace. The binary is
//! given by the user; nothing of it is part of this project.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use mesh_ctl::sandbox::process::Place;
use mesh_ctl::sandbox::{Sandbox, Topology, Workload, netns};

/// The peer has to enrol its workloads within this time.
const ENROLLED_WITHIN: Duration = Duration::from_secs(30);
/// Mark that the peer sets on its own sockets, and mark of connections to the application (Istio's values).
const MARKS: (&str, &str) = ("0x539/0xfff", "0x111/0xfff");

/// Starts controller, agent and a peer on each node; returns the peers in the order of the nodes.
///
/// # Errors
/// A part does not come up, or iptables is not installed.
pub fn start(sandbox: &mut Sandbox, binary: &Path) -> Result<Vec<Child>> {
    sandbox.start_agent()?;
    sandbox.start_controller()?;
    for workload in sandbox.topology().workloads.clone() {
        redirect(sandbox, &workload)?;
    }
    let nodes: Vec<String> = sandbox.topology().nodes.iter().map(|n| n.name.clone()).collect();
    let mut peers = Vec::new();
    for node in &nodes {
        match start_on(sandbox, node, binary) {
            Ok(peer) => peers.push(peer),
            Err(error) => {
                end(&mut peers)?;
                return Err(error);
            }
        }
    }
    if let Err(error) = wait_enrolled(sandbox) {
        end(&mut peers)?;
        return Err(error);
    }
    Ok(peers)
}

/// Ends peers.
///
/// # Errors
/// One cannot be waited for.
pub fn end(peers: &mut Vec<Child>) -> Result<()> {
    for mut peer in peers.drain(..) {
        peer.kill().context("end the peer")?;
        peer.wait().context("end the peer")?;
    }
    Ok(())
}

fn wait_enrolled(sandbox: &Sandbox) -> Result<()> {
    let deadline = Instant::now() + ENROLLED_WITHIN;
    loop {
        let missing = sandbox.agent_status()?.missing();
        if missing.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            let node = &sandbox.topology().nodes[0].name;
            let log = std::fs::read_to_string(sandbox.layout.node(node).join("peer.log")).unwrap_or_default();
            bail!("the peer did not enrol: {}; the end of its log: {:?}", missing.join("; "), log.lines().last());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn start_on(sandbox: &mut Sandbox, node: &str, binary: &Path) -> Result<Child> {
    let issued = std::fs::read_to_string(sandbox.node_token(node)?).context("token of the peer")?;
    // It takes the file as it is, and a header with a line's end is none.
    let token = sandbox.layout.node(node).join("peer-token");
    std::fs::write(&token, issued.trim()).context("token of the peer")?;
    let layout = &sandbox.layout;
    let controller = format!("https://{}:15012", Topology::host_addresses(0)[0]);
    let root = layout.controller().join("state/root-cert.pem");
    let log = std::fs::File::create(layout.node(node).join("peer.log")).context("log of the peer")?;
    let mut command = Command::new(binary);
    command.env_clear().stdin(Stdio::null()).stdout(log.try_clone().context("log")?).stderr(log);
    command.envs([
        ("PROXY_MODE", "shared"),
        ("NODE_NAME", node),
        ("POD_NAME", "ztunnel"),
        ("POD_NAMESPACE", "istio-system"),
        ("INSTANCE_IP", "127.0.0.1"),
        ("CLUSTER_ID", "Kubernetes"),
        ("XDS_ADDRESS", &controller),
        ("CA_ADDRESS", &controller),
        ("ALT_XDS_HOSTNAME", "istiod.istio-system.svc"),
        ("ALT_CA_HOSTNAME", "istiod.istio-system.svc"),
        ("ZTUNNEL_WORKER_THREADS", "1"),
        ("RUST_LOG", "warn,access=info"),
        ("AUTH_TOKEN", &token.display().to_string()),
        ("XDS_ROOT_CA", &root.display().to_string()),
        ("CA_ROOT_CA", &root.display().to_string()),
        ("INPOD_UDS", &layout.node_agent(node).display().to_string()),
    ]);
    command.process_group(0);
    Place::open(&layout.proxy_cgroup(node), Some(&layout.netns(node)))?.place(&mut command);
    command.spawn().with_context(|| format!("start {}", binary.display()))
}

/// Istio's in-pod redirection: what leaves goes to 15001, what arrives to 15006 but for 15008, and answers to the
/// peer's spoofed connections come back through `lo`.
fn redirect(sandbox: &Sandbox, workload: &Workload) -> Result<()> {
    let (own, inner) = MARKS;
    let rules = [
        "-t nat -A OUTPUT -d 127.0.0.1/32 -o lo -j ACCEPT".to_owned(),
        format!("-t nat -A OUTPUT -p tcp -m mark --mark {inner} -j ACCEPT"),
        format!("-t nat -A OUTPUT ! -d 127.0.0.1/32 -p tcp -m mark ! --mark {own} -j REDIRECT --to-ports 15001"),
        format!(
            "-t nat -A PREROUTING ! -d 127.0.0.1/32 -p tcp ! --dport 15008 -m mark ! --mark {own} -j REDIRECT --to-ports 15006"
        ),
        format!("-t mangle -A PREROUTING -m mark --mark {own} -j CONNMARK --set-xmark {inner}"),
        format!("-t mangle -A OUTPUT -m connmark --mark {inner} -j CONNMARK --restore-mark"),
    ];
    netns::run_in(&sandbox.layout.netns(&workload.key()), || {
        for rule in &rules {
            tool("iptables-legacy", rule)?;
        }
        tool("ip", &format!("rule add fwmark {inner} lookup 100"))?;
        tool("ip", "route add local 0.0.0.0/0 dev lo table 100")
    })
}

fn tool(program: &str, args: &str) -> Result<()> {
    let output = Command::new(program).args(args.split_whitespace()).output();
    let output = output.with_context(|| format!("{program} is not installed (apt-get install iptables iproute2)"))?;
    if !output.status.success() {
        bail!("{program} {args}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
