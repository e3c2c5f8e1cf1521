//! `mesh-node admin`: questions go in, answers come out, and it ends with the conversation.
#![allow(clippy::unwrap_used, reason = "a test ends where it fails")]

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

fn admin(socket: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mesh-node"));
    command
        .args(["admin", "--admin-socket", socket])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

#[test]
fn a_conversation_is_carried_both_ways_byte_by_byte() {
    let socket = std::env::temp_dir().join(format!("mesh-node-admin-{}", std::process::id()));
    let listener = UnixListener::bind(&socket).unwrap();
    let mut child = admin(socket.to_str().unwrap()).spawn().unwrap();
    let (mut connection, _) = listener.accept().unwrap();
    let (mut to, mut from) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let mut byte = [0];
    for question in *b"ask\n" {
        to.write_all(&[question]).unwrap();
        connection.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [question]);
        // Without a newline, and while more is to be asked.
        connection.write_all(&[question ^ 1]).unwrap();
        from.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [question ^ 1]);
    }
    drop(to);
    let mut rest = Vec::new();
    connection.read_to_end(&mut rest).unwrap();
    connection.write_all(b"bye").unwrap();
    drop(connection);
    from.read_to_end(&mut rest).unwrap();
    assert_eq!((rest.as_slice(), child.wait().unwrap().code()), (&b"bye"[..], Some(0)));
    std::fs::remove_file(&socket).unwrap();

    let refused = admin(socket.to_str().unwrap()).output().unwrap();
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(refused.status.code() == Some(1) && said.contains("connect to"), "{said}");
}
