//! What Maven brings: the jars of Kafka, of a compiler, and axe-core.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

/// Group, artifact, version.
pub type Artifact<'a> = (&'a str, &'a str, &'a str);

fn project(artifacts: &[Artifact<'_>]) -> String {
    let dependency = |(group, artifact, version): &Artifact<'_>| {
        format!(
            "<dependency><groupId>{group}</groupId><artifactId>{artifact}</artifactId>\
                <version>{version}</version></dependency>"
        )
    };
    let dependencies: String = artifacts.iter().map(dependency).collect();
    format!(
        "<project xmlns=\"http://maven.apache.org/POM/4.0.0\">
  <modelVersion>4.0.0</modelVersion>
  <groupId>payrelay.test</groupId><artifactId>parts</artifactId><version>1</version>
  <dependencies>{dependencies}</dependencies>
</project>
"
    )
}

/// One test brings a part, the others wait for it.
static BRINGING: Mutex<()> = Mutex::new(());

/// A folder with the jars of artifacts and of all that they need. Brought once; the first artifact
/// names it.
pub fn dependencies(artifacts: &[Artifact<'_>]) -> PathBuf {
    let (_, artifact, version) = artifacts[0];
    let home = bring(&format!("{artifact}-{version}"), |home| {
        copy_dependencies(&project(artifacts), home);
    });
    home.join("libs")
}

/// A folder with the files inside an artifact's jar. Brought once.
pub fn unpacked(group: &str, artifact: &str, version: &str) -> PathBuf {
    let home = bring(&format!("{artifact}-{version}-files"), |home| {
        let pom = project(&[(group, artifact, version)]);
        fs::write(home.join("pom.xml"), pom).expect("a fresh directory is writable");
        let goal = "dependency:unpack-dependencies";
        let alone = "-DexcludeTransitive=true";
        run(&[goal, alone, "-DoutputDirectory=files"], home);
    });
    home.join("files")
}

/// Whole or not at all.
fn bring(name: &str, fill: impl FnOnce(&Path)) -> PathBuf {
    let _one_at_a_time = super::lock(&BRINGING);
    let folder = crate::paths::target().join("maven");
    let home = folder.join(name);
    if !home.is_dir() {
        let part = folder.join(format!("{name}-part"));
        fs::create_dir_all(&part).expect("the target directory is writable");
        fill(&part);
        fs::rename(&part, &home).expect("both are in one folder");
    }
    home
}

/// Copies the jars of a project to `libs`.
pub(crate) fn copy_dependencies(pom: &str, home: &Path) {
    fs::write(home.join("pom.xml"), pom).expect("a fresh directory is writable");
    let goal = "dependency:copy-dependencies";
    run(
        &[goal, "-DincludeScope=runtime", "-DoutputDirectory=libs"],
        home,
    );
}

fn run(arguments: &[&str], home: &Path) {
    let mut maven = Command::new("mvn");
    maven.args(["-B", "-q"]).args(arguments).current_dir(home);
    crate::kafka::run(&mut maven);
}
