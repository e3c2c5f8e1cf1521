//! Which mesh and which node a command line means.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;

use serde_json::json;

use super::*;

/// A directory that goes away with the value.
struct TempDir(PathBuf);

impl TempDir {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("mesh-ctl-{test}-{}", std::process::id()));
        std::fs::create_dir(&path).expect("a fresh name");
        Self(path)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn status(node: &str) -> Value {
    json!({
        "node": node, "version": "1", "pid": 1, "ready": true, "waitingFor": [], "controller": "c:1",
        "controllerConnected": true, "configSource": "controller", "enrolled": [], "connections": 0, "uptimeSecs": 1,
    })
}

/// An admin socket that says it is of this node, as long as the process lives.
fn serve(dir: &TempDir, node: &'static str) -> PathBuf {
    let path = dir.0.join(node);
    let listener = UnixListener::bind(&path).expect("binds");
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let body = status(node).to_string();
            let head = BufReader::new(&stream).lines().map_while(Result::ok).take_while(|line| !line.is_empty());
            head.for_each(drop);
            let length = body.len();
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}");
            let _ = (&stream).write_all(answer.as_bytes());
        }
    });
    path
}

async fn nodes(global: &Global, saved: Option<&Saved>) -> Result<Vec<String>> {
    let gathered = Target::of(global, saved).await?.gather::<NodeStatus>(Section::Status).await;
    assert!(gathered.errors.is_empty(), "{:?}", gathered.errors);
    Ok(gathered.answers.into_iter().map(|answer| answer.item.node).collect())
}

fn of_node(node: &str) -> Global {
    Global { node: Some(node.to_owned()), ..Global::default() }
}

#[tokio::test]
async fn one_node_of_those_whose_sockets_are_named() {
    let dir = TempDir::new("sockets");
    let sockets = ["node-a", "node-b"].map(|node| serve(&dir, node));
    let global = |node| Global { admin_socket: sockets.to_vec(), ..of_node(node) };
    assert_eq!(nodes(&global("node-b"), None).await.expect("is there"), ["node-b"]);
    let error = nodes(&global("node-c"), None).await.expect_err("is not there");
    assert_eq!(
        (error.to_string().as_str(), crate::exit::code(&error)),
        ("no node `node-c`; there are node-a, node-b", crate::exit::USAGE,)
    );
    // A change is made on this node alone.
    let Target::Live(found) = Target::of(&global("node-a"), None).await.expect("is there") else { panic!() };
    let [Node { door: Door::Socket(socket), .. }] = &found.nodes[..] else { panic!("{found:?}") };
    assert_eq!(socket, &sockets[0]);

    // One that does not answer may be the one, or not matter.
    let silent = Global { admin_socket: vec![dir.0.join("nobody"), sockets[1].clone()], ..of_node("node-b") };
    assert_eq!(nodes(&silent, None).await.expect("is there"), ["node-b"]);
    let error = nodes(&Global { node: Some("node-a".into()), ..silent }, None).await.expect_err("who knows");
    assert_eq!(crate::exit::code(&error), crate::exit::UNAVAILABLE, "{error:#}");
}

#[tokio::test]
async fn one_node_of_a_saved_dump() {
    let dir = TempDir::new("dump");
    let file = dir.0.join("dump.json");
    let item = |node: &str| json!({"node": node, "status": status(node)});
    let dump = json!({"kind": "Dump", "controller": null, "items": [item("node-a"), item("node-b")]});
    std::fs::write(&file, dump.to_string()).expect("writes");
    let saved = Saved { file: Some(file) };
    assert_eq!(nodes(&Global::default(), Some(&saved)).await.expect("both"), ["node-a", "node-b"]);
    assert_eq!(nodes(&of_node("node-b"), Some(&saved)).await.expect("is there"), ["node-b"]);
    let error = nodes(&of_node("node-c"), Some(&saved)).await.expect_err("is not there");
    assert_eq!(error.to_string(), "no node `node-c`; there are node-a, node-b");
}
