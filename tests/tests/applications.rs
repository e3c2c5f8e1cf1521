//! Real clients and servers, as Debian has them, through the mesh: to another node and on one node.
//!
//! Each case ends with a look at who was seen: the node proxies name both identities, and the server names the
//! client's own address.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use mesh_ctl::sandbox::{Topology, Workload};
use mesh_tests::ends::Family;
use mesh_tests::mesh_bed::{MeshBed, eventually};
use mesh_tests::sandbox_bed::{Ran, finish};

/// Servers: on the client's node, and on the other one.
const SERVERS: [&str; 2] = ["near", "far"];
/// A body that needs every window and buffer on the way many times.
const LARGE_BYTES: usize = 16 << 20;

/// A directory of the test's; goes with it.
struct Files(PathBuf);

impl Files {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("mesh-t-{name}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        // Servers run as users of their own.
        fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn write(&self, name: &str, contents: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, contents).unwrap();
        path
    }

    /// Bytes that do not compress and do not repeat.
    fn large(&self, name: &str) -> PathBuf {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        };
        self.write(name, (0..LARGE_BYTES / 8).flat_map(|_| next()).collect::<Vec<u8>>())
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

/// `client` and `near` on node-a, `far` on node-b; the latter two run a server, which listens on a port.
fn topology(port: u16, server: impl Fn(&str) -> Vec<String>) -> Topology {
    let workload = |name: &str, node: &str| Workload::new(name, node).runs(server(name)).ready_on(port);
    Topology::new()
        .node("node-a")
        .node("node-b")
        .namespace("default", &[("istio.io/dataplane-mode", "ambient")])
        .workload(Workload::new("client", "node-a"))
        .workload(workload("near", "node-a"))
        .workload(workload("far", "node-b"))
}

fn words(command: &str) -> Vec<String> {
    command.split_whitespace().map(str::to_owned).collect()
}

/// A program inside `client`.
fn program(bed: &MeshBed, name: &str, arguments: &[&str]) -> Command {
    let mut command = bed.sandbox.command("client", name).unwrap();
    command.args(arguments).stdin(std::process::Stdio::null());
    command
}

/// Runs a program inside `client`; it has to succeed.
fn run(bed: &MeshBed, name: &str, arguments: &[&str]) -> Ran {
    let ran = finish(program(bed, name, arguments));
    ran.succeeds();
    ran
}

/// As [`run`], with standard input from a file.
fn run_with(bed: &MeshBed, input: &Path, name: &str, arguments: &[&str]) -> Ran {
    let mut command = program(bed, name, arguments);
    command.stdin(fs::File::open(input).unwrap());
    let ran = finish(command);
    ran.succeeds();
    ran
}

fn same(one: &Path, other: &Path, what: &str) {
    let (one, other) = (fs::read(one).unwrap(), fs::read(other).unwrap());
    assert_eq!(one.len(), other.len(), "{what}: length");
    let differs = one.iter().zip(&other).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{what}: the first byte that differs");
}

fn addresses(bed: &MeshBed, workload: &str) -> (IpAddr, IpAddr) {
    (bed.address_of(workload, Family::V4), bed.address_of(workload, Family::V6))
}

/// The server's log of a workload, when it has a line with this.
fn server_logged(bed: &MeshBed, workload: &str, text: &str) {
    let log = bed.sandbox.layout.log(&mesh_ctl::sandbox::Part::Workload(workload.to_owned()));
    eventually(&format!("`{text}` in {}", log.display()), || {
        fs::read_to_string(&log).ok()?.lines().any(|line| line.contains(text)).then_some(())
    });
}

fn nginx(files: &Files, name: &str) -> Vec<String> {
    let dir = files.path(name);
    let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path {};", dir.join(kind).display()))
        .join(" ");
    let shown = dir.display();
    let config = format!(
        "daemon off; user root; worker_processes 1; pid {shown}/pid; error_log stderr;
         events {{}}
         http {{
           log_format who '$remote_addr $request_method $uri $status on request $connection_requests';
           access_log /dev/stdout who; {temporary}
           server {{
             listen 80; listen [::]:80; root {shown}/www; client_max_body_size 0;
             location /upload/ {{ dav_methods PUT; create_full_put_path on; }}
           }}
         }}"
    );
    let config = files.write(&format!("{name}/nginx.conf"), config);
    words(&format!("nginx -p {shown} -e stderr -c {}", config.display()))
}

#[test]
fn curl_and_nginx() {
    let files = Files::new("nginx");
    let large = files.large("large");
    for name in SERVERS {
        files.write(&format!("{name}/www/small"), format!("{name} says hello\n"));
        fs::hard_link(&large, files.path(name).join("www/large")).unwrap();
    }
    let bed = MeshBed::up("nginx", topology(80, |name| nginx(&files, name)));
    let own = addresses(&bed, "client");
    for name in SERVERS {
        let (v4, v6) = addresses(&bed, name);
        let small = format!("http://{v4}/small");
        run(&bed, "curl", &["-sSf", &small]).prints(&format!("{name} says hello\n"));
        // One connection for three requests.
        let ran = run(&bed, "curl", &["-sSf", "-w", "%{num_connects} new\\n", &small, &small, &small]);
        assert_eq!(ran.stdout.matches("1 new").count(), 1, "{}", ran.all());
        assert_eq!(ran.stdout.matches("0 new").count(), 2, "{}", ran.all());
        run(&bed, "curl", &["-sSf", &format!("http://[{v6}]/small")]).prints(&format!("{name} says hello\n"));

        let (down, up) = (files.path("down"), files.path(name).join("www/upload/large"));
        run(&bed, "curl", &["-sSf", "-o", &down.display().to_string(), &format!("http://{v4}/large")]);
        same(&down, &large, &format!("down from {name}"));
        run(&bed, "curl", &["-sSf", "-T", &large.display().to_string(), &format!("http://{v4}/upload/large")]);
        same(&up, &large, &format!("up to {name}"));

        server_logged(&bed, name, &format!("{} GET /small 200 on request 3", own.0));
        server_logged(&bed, name, &format!("{} GET /small 200 on request 1", own.1));
        server_logged(&bed, name, &format!("{} PUT /upload/large 201", own.0));
        bed.carried("client", name);
    }
}

#[test]
fn redis_and_its_client() {
    let files = Files::new("redis");
    let large = files.write("large", "0123456789abcdef".repeat(LARGE_BYTES / 4 / 16));
    let bulk: String = (0..20_000).map(|n| format!("SET key:{n} value-{n}\r\n")).collect();
    let bulk = files.write("bulk", bulk);
    let server = |name: &str| {
        let dir = files.path(name);
        fs::create_dir(&dir).unwrap();
        words(&format!("redis-server --port 6379 --bind * -::* --protected-mode no --save  --dir {}", dir.display()))
    };
    let bed = MeshBed::up("redis", topology(6379, server));
    let own = addresses(&bed, "client").0;
    for name in SERVERS {
        let address = addresses(&bed, name).0.to_string();
        let cli = ["-h", &address];
        let ask = |command: &[&str]| run(&bed, "redis-cli", &[&cli, command].concat());
        ask(&["SET", "greeting", "hello"]).prints("OK");
        ask(&["GET", "greeting"]).prints("hello\n");
        run_with(&bed, &bulk, "redis-cli", &[&cli[..], &["--pipe"]].concat()).prints("errors: 0, replies: 20000");
        ask(&["DBSIZE"]).prints("20001\n");
        ask(&["GET", "key:19999"]).prints("value-19999\n");
        run_with(&bed, &large, "redis-cli", &[&cli[..], &["-x", "SET", "large"]].concat()).prints("OK");
        let back = ask(&["GET", "large"]).stdout;
        assert!(back.trim_end() == fs::read_to_string(&large).unwrap(), "{name}: the large value came back changed");
        let clients = ask(&["CLIENT", "LIST"]);
        clients.prints(&format!(" addr={own}:")).prints(&format!(" laddr={address}:6379 "));
        bed.carried("client", name);
    }
}

/// Directory of the server's programs, which Debian keeps out of `PATH`.
fn postgres_programs() -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").unwrap().flatten();
    versions.map(|version| version.path().join("bin")).max().expect("PostgreSQL is installed")
}

/// The server refuses to run as root.
const AS_POSTGRES: &str = "setpriv --reuid=postgres --regid=postgres --clear-groups --";

/// A database with a certificate, for a server of this name.
fn database(files: &Files, name: &str) -> Vec<String> {
    let programs = postgres_programs().display().to_string();
    let user = nix::unistd::User::from_name("postgres").unwrap().expect("user postgres");
    let (uid, gid) = (user.uid.as_raw(), user.gid.as_raw());
    let dir = files.path(name);
    fs::create_dir(&dir).unwrap();
    chown(&dir, Some(uid), Some(gid)).unwrap();
    let data = dir.join("data");
    let shown = data.display();
    let init = format!("{AS_POSTGRES} {programs}/initdb --no-sync --no-instructions --auth=trust --pgdata {shown}");
    let init = words(&init);
    let mut command = Command::new(&init[0]);
    command.args(&init[1..]);
    finish(command).succeeds();
    let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
    fs::write(data.join("server.crt"), made.cert.pem()).unwrap();
    let key = data.join("server.key");
    fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    fs::set_permissions(&key, PermissionsExt::from_mode(0o600)).unwrap();
    chown(&key, Some(uid), Some(gid)).unwrap();
    fs::write(data.join("pg_hba.conf"), "host all all all trust\n").unwrap();
    words(&format!(
        "{AS_POSTGRES} {programs}/postgres -D {shown} -c listen_addresses=* -c unix_socket_directories= -c ssl=on -c fsync=off"
    ))
}

#[test]
fn psql_and_postgresql_in_clear_and_with_tls_of_their_own() {
    const ROWS: usize = 200_000;
    let files = Files::new("postgres");
    let rows: String = (0..ROWS).map(|n| format!("{n}\trow {n}\n")).collect();
    let rows_file = files.write("rows", &rows);
    let bed = MeshBed::up("pg", topology(5432, |name| database(&files, name)));
    let own = addresses(&bed, "client").0;
    for name in SERVERS {
        let address = addresses(&bed, name).0;
        for (mode, tls) in [("disable", "f"), ("require", "t")] {
            let target = format!("host={address} user=postgres dbname=postgres sslmode={mode}");
            let psql = [&target, "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"];
            let ask = |sql: &str| run(&bed, "psql", &[&psql[..], &["-c", sql]].concat());
            let who = ask("select inet_client_addr(), inet_server_addr(), inet_server_port()");
            assert_eq!(who.stdout.trim(), format!("{own}|{address}|5432"), "{}", who.all());
            let ssl = ask("select ssl, version from pg_stat_ssl where pid = pg_backend_pid()");
            assert!(ssl.stdout.starts_with(&format!("{tls}|")), "{mode}: {}", ssl.all());
            ask("create table items (n int, name text)");
            let copy = "copy items from stdin";
            run_with(&bed, &rows_file, "psql", &[&psql[..], &["-c", copy]].concat());
            let back = ask("copy items to stdout");
            assert!(back.stdout == rows, "{name} with {mode}: {} bytes of {} came back", back.stdout.len(), rows.len());
            ask("drop table items");
        }
        let conninfo = run(
            &bed,
            "psql",
            &[&format!("host={address} user=postgres dbname=postgres sslmode=require"), "-X", "-c", "\\conninfo"],
        );
        conninfo.prints("SSL connection (protocol: TLSv1.3");
        bed.carried("client", name);
    }
}

#[test]
fn iperf3_both_directions() {
    let bed = MeshBed::up("iperf", topology(5201, |_| words("iperf3 -s -p 5201 --forceflush")));
    let own = addresses(&bed, "client").0;
    for name in SERVERS {
        let address = addresses(&bed, name).0.to_string();
        // Not `--bidir`: there the server gives connections their roles in the order in which they come, and a proxy that
        // accepts for the server does not keep the order of two connections.
        for more in [&["-P", "4"][..], &["-R", "-P", "4"]] {
            let ran = run(&bed, "iperf3", &[&["-c", &address, "-J", "-t", "1"], more].concat());
            let end = &ran.json()["end"];
            let received = end["sum_received"]["bytes"].as_u64().unwrap_or_default();
            assert!(received > LARGE_BYTES as u64 / 4, "{name} {more:?}: {received} bytes: {}", ran.all());
        }
        server_logged(&bed, name, &format!("Accepted connection from {own},"));
        bed.carried("client", name);
    }
}

/// `sshd` in a mount namespace of its own, where it finds the directory that it insists on, and an account of root that
/// is not locked, whatever the machine has.
fn sshd(files: &Files, name: &str) -> Vec<String> {
    let dir = files.path(name);
    let host_key = dir.join("host_key");
    fs::create_dir(&dir).unwrap();
    keygen(&host_key);
    let shadow = files.write(&format!("{name}/shadow"), "root:*:19000:0:99999:7:::\nsshd:!:19000::::::\n");
    let config = format!(
        "Port 22\nHostKey {}\nAuthorizedKeysFile {}\nPidFile none\nStrictModes no\nUsePAM no\nPermitRootLogin yes\n",
        host_key.display(),
        files.path("key.pub").display(),
    );
    let config = files.write(&format!("{name}/sshd_config"), config);
    let script = format!(
        "mount --bind {} /etc/shadow && mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd && exec /usr/sbin/sshd -D -e -f {}",
        shadow.display(),
        config.display()
    );
    ["unshare", "--mount", "sh", "-c", &script].map(str::to_owned).into()
}

fn keygen(path: &Path) {
    let mut command = Command::new("ssh-keygen");
    command.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(path);
    finish(command).succeeds();
}

/// The server speaks first.
#[test]
fn ssh_runs_commands() {
    let files = Files::new("ssh");
    let key = files.path("key");
    keygen(&key);
    let large = files.large("large");
    let bed = MeshBed::up("ssh", topology(22, |name| sshd(&files, name)));
    let own = addresses(&bed, "client").0;
    for name in SERVERS {
        let address = addresses(&bed, name).0;
        let ssh = |command: &str| {
            let fixed = "-F none -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR -i";
            let mut ssh = program(&bed, "ssh", &fixed.split(' ').collect::<Vec<_>>());
            ssh.args([&key.display().to_string(), &format!("root@{address}"), command]);
            ssh
        };
        let ran = finish(ssh("echo $SSH_CONNECTION"));
        let seen: Vec<&str> = ran.succeeds().stdout.split_whitespace().collect();
        assert_eq!((seen[0], seen[2]), (&*own.to_string(), &*address.to_string()), "{}", ran.all());
        finish(ssh("echo out; echo err >&2; exit 7")).exits(7).prints("out\n").complains("err\n");
        let back = files.path("back");
        let mut cat = ssh("cat");
        cat.stdin(fs::File::open(&large).unwrap()).stdout(fs::File::create(&back).unwrap());
        assert!(cat.status().unwrap().success(), "{name}: cat");
        same(&back, &large, &format!("there and back through {name}"));
        bed.carried("client", name);
    }
}

fn vsftpd(files: &Files, name: &str) -> Vec<String> {
    let dir = files.path(name);
    fs::create_dir_all(dir.join("empty")).unwrap();
    let config = format!(
        "listen=YES\nbackground=NO\nanonymous_enable=YES\nno_anon_password=YES\nanon_root={}\n\
         secure_chroot_dir={}\nconnect_from_port_20=NO\nseccomp_sandbox=NO\nisolate=NO\nisolate_network=NO\n\
         xferlog_enable=YES\nvsftpd_log_file={}\n",
        dir.join("pub").display(),
        dir.join("empty").display(),
        dir.join("log").display(),
    );
    let config = files.write(&format!("{name}/vsftpd.conf"), config);
    vec!["vsftpd".to_owned(), config.display().to_string()]
}

/// A protocol that speaks first and that writes addresses into its messages: those that `getsockname` gives. In active
/// mode the server, which is in the mesh too, dials the client.
#[test]
fn ftp_with_data_connections_both_ways() {
    let files = Files::new("ftp");
    let large = files.large("large");
    for name in SERVERS {
        files.write(&format!("{name}/pub/small"), format!("{name} says hello\n"));
        fs::hard_link(&large, files.path(name).join("pub/large")).unwrap();
    }
    let bed = MeshBed::up("ftp", topology(21, |name| vsftpd(&files, name)));
    let own = addresses(&bed, "client").0;
    let down = files.path("down").display().to_string();
    for name in SERVERS {
        let address = addresses(&bed, name).0;
        for mode in [&["--disable-epsv"][..], &["--ftp-port", "-", "--disable-eprt"]] {
            let fetch = |more: &[&str], file: &str| {
                run(&bed, "curl", &[&["-sSfv"], mode, more, &[&format!("ftp://{address}/{file}")]].concat())
            };
            // In active mode the server is connected as soon as its own proxy has accepted, and may say that a small file is
            // sent before the client has seen its connection, which is too late for curl. It is so with any such proxy.
            if mode[0] != "--ftp-port" {
                fetch(&[], "small").prints(&format!("{name} says hello\n"));
            }
            fetch(&["-o", &down], "large");
            same(Path::new(&down), &large, &format!("{mode:?} from {name}"));
        }
        let log = fs::read_to_string(files.path(name).join("log")).unwrap();
        let client = format!("OK DOWNLOAD: Client \"{own}\"");
        let client6 = format!("OK DOWNLOAD: Client \"::ffff:{own}\"");
        assert!(log.contains(&client) || log.contains(&client6), "{log}");
        bed.carried("client", name);
        bed.carried(name, "client");
    }
}
