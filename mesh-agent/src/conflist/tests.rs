use super::*;

fn ours() -> PluginConfig {
    PluginConfig { wait_secs: 90, ..PluginConfig::default() }
}

const OURS: &str = r#"{"type":"mesh-cni","agentSocket":"/run/mesh/cni.sock","excludeNamespaces":["kube-system","istio-system"],
    "logFile":"/var/log/mesh/cni.log","stateDir":"/var/lib/mesh/cni","waitSecs":90}"#;

/// `expected` has `OURS` where our part belongs.
#[track_caller]
fn check(main: &str, expected: &str) {
    let wrapped = wrap(main, &ours()).unwrap();
    let found: Value = serde_json::from_str(&wrapped).unwrap();
    let expected: Value = serde_json::from_str(&expected.replace("OURS", OURS)).unwrap();
    assert_eq!(found, expected, "{wrapped}");
    // What was wrapped once is wrapped to the same.
    assert_eq!(wrap(&wrapped, &ours()).unwrap(), wrapped);
}

#[test]
fn our_plugin_is_the_last_of_a_copy() {
    let bridge = r#"{"cniVersion":"1.0.0","name":"cbr0","plugins":[
        {"type":"bridge","bridge":"cni0","isGateway":true,"ipMasq":true,"mtu":1450,
         "ipam":{"type":"host-local","ranges":[[{"subnet":"10.244.1.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}},
        {"type":"portmap","capabilities":{"portMappings":true}}LAST]}"#;
    check(&bridge.replace("LAST", ""), &bridge.replace("LAST", ",OURS"));
    let ptp = r#"{"cniVersion":"0.3.1","name":"kindnet","plugins":[
        {"type":"ptp","ipMasq":false,"ipam":{"type":"host-local","dataDir":"/run/cni-ipam-state"},"mtu":1500}LAST]}"#;
    check(&ptp.replace("LAST", ""), &ptp.replace("LAST", ",OURS"));
    let calico = r#"{"name":"k8s-pod-network","cniVersion":"0.3.1","disableCheck":true,"plugins":[
        {"type":"calico","log_level":"info","datastore_type":"kubernetes","nodename":"n1","mtu":0,
         "policy":{"type":"k8s"},"kubernetes":{"kubeconfig":"/etc/cni/net.d/calico-kubeconfig"}},
        {"type":"portmap","snat":true,"capabilities":{"portMappings":true}},
        {"type":"bandwidth","capabilities":{"bandwidth":true}}LAST]}"#;
    check(&calico.replace("LAST", ""), &calico.replace("LAST", ",OURS"));
    let flannel = r#"{"name":"cbr0","cniVersion":"0.3.1","plugins":[
        {"type":"flannel","delegate":{"hairpinMode":true,"isDefaultGateway":true}},
        {"type":"portmap","capabilities":{"portMappings":true}}LAST]}"#;
    check(&flannel.replace("LAST", ""), &flannel.replace("LAST", ",OURS"));
}

#[test]
fn a_single_plugin_becomes_a_list() {
    let cilium = r#"{"cniVersion":"0.3.1","name":"cilium","type":"cilium-cni","enable-debug":false}"#;
    check(cilium, &format!(r#"{{"cniVersion":"0.3.1","name":"cilium","plugins":[{cilium},OURS]}}"#));
}

#[test]
fn what_nothing_can_be_chained_to_is_said() {
    let check = |main: &str, expected: &str| {
        let error = format!("{:#}", wrap(main, &ours()).unwrap_err());
        assert!(error.contains(expected), "{main}: {error}");
    };
    check("", "it is not JSON");
    check("[]", "it is not a JSON object");
    check("{}", "it has neither plugins nor a type");
    check(r#"{"name":"a","cniVersion":"1.0.0","plugins":[]}"#, "it has no plugins");
    check(r#"{"name":"a","cniVersion":"1.0.0","plugins":{}}"#, "its plugins are no list");
    check(r#"{"name":"a","cniVersion":"1.0.0","plugins":[{"type":"mesh-cni"}]}"#, "it has no plugins");
    check(r#"{"name":"a","type":"bridge"}"#, "its cniVersion is ``");
    check(r#"{"name":"a","cniVersion":"0.2.0","type":"bridge"}"#, "its cniVersion is `0.2.0`");
    check(r#"{"cniVersion":"1.0.0","type":"bridge"}"#, "it has no name");
}

#[test]
fn the_main_configuration_is_the_first_of_the_others() {
    let names =
        ["20-b.conf", FILE, "10-a.conflist", "05-x.cilium_bak", "README", "30-c.json", ".00-mesh.conflist.7.tmp"];
    assert_eq!(candidates(names.map(str::to_owned).into()), ["10-a.conflist", "20-b.conf", "30-c.json"]);
}

#[test]
fn our_file_follows_the_main_one_and_goes_with_it() {
    let dir = std::env::temp_dir().join(format!("mesh-agent-conflist-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let main = |mtu: u32| format!(r#"{{"name":"a","cniVersion":"1.0.0","type":"ptp","mtu":{mtu}}}"#);
    let mtu = || {
        let text = fs::read_to_string(dir.join(FILE)).unwrap();
        serde_json::from_str::<Value>(&text).unwrap()["plugins"][0]["mtu"].clone()
    };
    assert_eq!(keep(&dir, &ours()).unwrap(), Kept::Absent);
    fs::write(dir.join("10-a.conf"), main(1500)).unwrap();
    assert_eq!(keep(&dir, &ours()).unwrap(), Kept::Written("10-a.conf".to_owned()));
    assert_eq!((keep(&dir, &ours()).unwrap(), mtu()), (Kept::Unchanged, json!(1500)));
    fs::write(dir.join("10-a.conf"), main(1400)).unwrap();
    assert_eq!(keep(&dir, &ours()).unwrap(), Kept::Written("10-a.conf".to_owned()));
    assert_eq!(mtu(), json!(1400));
    // Somebody else's hand.
    fs::write(dir.join(FILE), "{}").unwrap();
    assert_eq!(keep(&dir, &ours()).unwrap(), Kept::Written("10-a.conf".to_owned()));
    // Half written: what was there stays.
    fs::write(dir.join("10-a.conf"), "{").unwrap();
    assert!(matches!(keep(&dir, &ours()).unwrap(), Kept::Failed(why) if why.starts_with("10-a.conf: it is not JSON")));
    assert_eq!(mtu(), json!(1400));
    fs::write(dir.join("00-a.conf"), main(1500)).unwrap();
    assert!(matches!(keep(&dir, &ours()).unwrap(), Kept::Failed(why) if why.contains("sorts before")));
    fs::remove_file(dir.join("00-a.conf")).unwrap();
    fs::remove_file(dir.join("10-a.conf")).unwrap();
    assert_eq!(keep(&dir, &ours()).unwrap(), Kept::Absent);
    assert!(!dir.join(FILE).exists());
    fs::remove_dir_all(dir).unwrap();
}

#[test]
fn a_plugin_that_was_taken_away_is_put_back_and_another_one_stays() {
    let dir = std::env::temp_dir().join(format!("mesh-agent-bin-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let mut install = || -> Result<()> { Ok(replace(&dir, PLUGIN, (b"ours", 0o755))?) };
    assert!(keep_plugin(&dir, &mut install).unwrap());
    assert!(!keep_plugin(&dir, &mut install).unwrap());
    fs::write(dir.join(PLUGIN), "of a newer agent").unwrap();
    assert!(!keep_plugin(&dir, &mut install).unwrap());
    assert_eq!(fs::read_to_string(dir.join(PLUGIN)).unwrap(), "of a newer agent");
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "nothing else is left behind");
    fs::remove_dir_all(dir).unwrap();
}
