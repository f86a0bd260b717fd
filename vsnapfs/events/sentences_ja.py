"""イベントの日本語の文言。What the events say in Japanese, in our own words.

Owns the Japanese sentences and phrases; the names and the notation are those of `sentences_en`.
Words: volume ボリューム, replica レプリカ, diff area 差分領域, recovery point 回復ポイント,
block ブロック, preserve 退避, used 使用, allocated 割り当て済み, maximum 最大.
"""

from __future__ import annotations

CULTURE = "ja-JP"
LEVELS = {"Error": "エラー", "Warning": "警告", "Information": "情報"}
BYTES = "バイト"
SEPARATOR = "、"
SIZES = {"used": "使用 {n}", "allocated": "割り当て済み {n}", "maximum": "最大 {n}"}

COUNTED = {
    "points_phrase": ("{n} 個の回復ポイント", "{n} 個の回復ポイント"),
    "gone": (" {n} 個の回復ポイント", " {n} 個の回復ポイント"),
    "blocks_left": (
        "退避が必要なブロックはあと {n} 個ありました",
        "退避が必要なブロックはあと {n} 個ありました",
    ),
    "blocks": ("{n} ブロック", "{n} ブロック"),
    "copies": ("{n} 個の写しが破損", "{n} 個の写しが破損"),
    "writes_waited": ("{n} 件の書き込みが待たされました", "{n} 件の書き込みが待たされました"),
    "more_times": ("さらに {n} 回", "さらに {n} 回"),
    "more_flushes": (
        "フラッシュがさらに {n} 回失敗しました",
        "フラッシュがさらに {n} 回失敗しました",
    ),
}
LISTED = {
    "points_phrase": ("回復ポイント {n}", "回復ポイント {n}"),
    "gone": ("回復ポイント {n} ", "回復ポイント {n} "),
}

PHRASES = {
    "the_volume": "[ボリューム {volume} |ボリューム]",
    "the_area": "[差分領域 {diff_area} |差分領域]",
    "the_point": "[回復ポイント {point}[「{label}」| ]|回復ポイント[「{label}」]]",
    "given_up": "[{gone}|[回復ポイント {point}[「{label}」| ]|回復ポイント]]",
    "range": "[バイト位置 {offset} から {length}|[バイト位置 {offset}|[{length}]]]",
    "target": "[ブロック {block}[ (書き込み: {range})]|[書き込み: {range}]]",
    "request": "[{target}[。{blocks_left}]|[{blocks_left}]]",
    "cause": "[{reason}[ ({error})]|[{error}]]",
    "place": "[ブロック {block}[、{range}]|[{range}]]",
}

ERRORS = {
    "EACCES": "アクセスが拒否されました",
    "EAGAIN": "資源が一時的に使えません",
    "EBADF": "ファイル記述子が正しくありません",
    "EBUSY": "使用中です",
    "EDQUOT": "クォータの上限に達しました",
    "EFBIG": "ファイルが大きすぎます",
    "EINVAL": "引数が正しくありません",
    "EIO": "入出力エラー",
    "ENODEV": "そのようなデバイスはありません",
    "ENOENT": "そのようなファイルやディレクトリはありません",
    "ENOMEM": "メモリが足りません",
    "ENOSPC": "デバイスに空き領域がありません",
    "ENOTSUP": "対応していない操作です",
    "ENXIO": "そのようなデバイスやアドレスはありません",
    "EOPNOTSUPP": "対応していない操作です",
    "EPERM": "許可されていない操作です",
    "EROFS": "読み取り専用のファイル システムです",
    "ESTALE": "ハンドルが無効になりました",
    "ETIMEDOUT": "時間切れになりました",
}

_WHY = "[対象: {request}。][原因: {cause}。]"
_SIZES = "[容量: {sizes}。]" + _WHY
_FACTS = "[差分領域[ {diff_area} ]の容量: {sizes}。|[差分領域: {diff_area}。]]" + _WHY
_KEPT = "回復ポイントはすべて保たれており、引き続き読み取りとエクスポートができます。"
_OFFLINE = "回復ポイントを守るため、{the_volume}はオフラインになりました。"
_ONLINE = "`vsnapfs online {VOLUME}` を実行してください。"
_RESIZE = "`vsnapfs resize {VOLUME} --diff-area-size 合計サイズ`"
_GROW = _RESIZE + " で差分領域を拡張してください。"
_AGAIN = "ディスクの状態を確認してから、" + _ONLINE
_LOST = "{the_volume}は{given_up}を破棄しました"

GENERIC = "ソース {source} のイベント {event_id} です[ (ボリューム {volume})][。{cause}]。"

SENTENCES: dict[tuple[str, int], str] = {
    ("volsnap", 8): (
        "{the_volume}の回復ポイントは作成されませんでした。処理中の書き込みが制限時間内に終わり"
        "ませんでした。[原因: {cause}。]何も変更されていません。負荷が下がってからもう一度試して"
        "ください。"
    ),
    ("volsnap", 14): (
        _LOST + "。{the_area}の読み書きに失敗したためです。ボリューム自体は動作を続けます。"
        "[原因: {cause}。]新しい回復ポイントに頼る前に、ディスクの状態を確認してください。"
    ),
    ("volsnap", 24): (
        "{the_volume}の{the_area}があるディスクには、差分領域を拡張できるだけの空き領域がありま"
        "せん。回復ポイントが失われるおそれがあります。[容量: {sizes}。][原因: {cause}。]"
        "ディスクの空き領域を増やすか、不要な回復ポイントを削除してください。"
    ),
    ("volsnap", 25): (
        _LOST + "。上書きされるブロックを退避する領域を、{the_area}に間に合うように確保できな"
        "かったためです。[容量: {sizes}。][原因: {cause}。]" + _GROW
    ),
    ("volsnap", 33): (
        "{the_area}を最大サイズ以内に保つため、{the_volume}の最も古い{the_point}を削除しました。"
        "[容量: {sizes}。]"
    ),
    ("volsnap", 35): (
        _LOST + "。{the_area}を拡張できなかったためです。[容量: {sizes}。][原因: {cause}。]"
        "差分領域があるディスクの空き領域を増やしてください。"
    ),
    ("volsnap", 36): (
        _LOST + "。{the_area}は設定された最大サイズを超えて拡張できないためです。"
        "[容量: {sizes}。]" + _GROW
    ),
    ("volsnap", 38): (
        "{the_volume}の{the_area}は最大サイズに達しており、これ以上拡張できません。回復ポイント"
        "が失われるおそれがあります。[容量: {sizes}。]" + _GROW
    ),
    ("volsnap", 58): (
        "1 つのボリュームに置ける回復ポイントの数を超えないように、{the_volume}の最も古い"
        "{the_point}を削除しました。"
    ),
    ("volsnap", 61): (
        "{the_volume}で{the_point}を復元中に、読み取れない部分がありました[ ({place})]。"
        "[原因: {cause}。]ほかに影響がないか `vsnapfs verify {VOLUME}` で確認してください。"
    ),
    ("volsnap", 64): (
        "{the_volume}への{the_point}の復元を開始しました[ (書き戻す量: {blocks})]。完了する"
        "までレプリカは開けません。"
    ),
    ("volsnap", 65): "中断された{the_volume}への{the_point}の復元を再開しました。",
    ("volsnap", 66): (
        "{the_volume}への{the_point}の復元が完了しました[ (書き戻した量: {blocks})]。"
        "レプリカを再び開くことができます。"
    ),
    ("volsnap", 80): (
        "{the_area}が所定の場所にないため、{the_volume}はオフラインの状態で開かれました。"
        + _SIZES
        + "差分領域が戻れば回復ポイントは再び読み取れます。戻したあとにボリュームを開くと、"
        "自動的にオンラインになります。"
    ),
    ("volsnap", 81): (
        "{the_area}のカタログの読み取りに失敗したため、{the_volume}はオフラインの状態で開かれま"
        "した。" + _SIZES + _AGAIN
    ),
    ("volsnap", 82): (
        "{the_area}の管理構造のチェックサムが、2 つ目の写しも含めて一致しないため、{the_volume}は"
        "オフラインになりました。" + _SIZES + "影響の範囲は `vsnapfs verify {VOLUME}` で確認でき"
        "ます。差分領域を元に戻す方法がない場合は、`vsnapfs online {VOLUME}"
        " --give-up-recovery-points` で空の差分領域から始められます。"
    ),
    ("volsnap", 83): (
        _OFFLINE
        + "ブロックを退避するためのメモリがありませんでした。"
        + _FACTS
        + _KEPT
        + "メモリを空けるかプロセスの上限を引き上げてから、"
        + _ONLINE
    ),
    ("volsnap", 84): (
        _OFFLINE
        + "書き込みバッファのメモリをマップできませんでした。"
        + _FACTS
        + _KEPT
        + "メモリを空けるかプロセスの上限を引き上げてから、"
        + _ONLINE
    ),
    ("volsnap", 85): (
        _OFFLINE
        + "上書きされる前の内容をレプリカから読み取れませんでした。"
        + _FACTS
        + _KEPT
        + _AGAIN
    ),
    ("volsnap", 86): (
        _OFFLINE + "ブロックを{the_area}に退避できませんでした。書き込みか読み戻しに失敗して"
        "います。" + _SIZES + _KEPT + _AGAIN
    ),
    ("volsnap", 87): (
        _OFFLINE
        + "{the_area}が一杯で、上書きされるブロックを退避できませんでした。"
        + _SIZES
        + _KEPT
        + _RESIZE
        + " で拡張する (追加分ではなく拡張後の合計を指定) か、回復ポイントを"
        "削除してから、" + _ONLINE
    ),
    ("volsnap", 88): (
        _OFFLINE
        + "{the_area}の拡張が間に合わないうちに、書き込みが空き領域を必要としました。"
        + _SIZES
        + _KEPT
        + "負荷を下げるか、より速いディスクに移してから、"
        + _ONLINE
    ),
    ("volsnap", 89): (
        _OFFLINE
        + "{the_area}は最大サイズに達していませんが、拡張に失敗しました。"
        + _SIZES
        + _KEPT
        + "差分領域があるディスクの空き領域を増やすか、クォータを確認してから、"
        + _ONLINE
    ),
    ("volsnap", 90): (
        _OFFLINE
        + "vsnapfs の予期しないエラーにより、ブロックを退避できませんでした。"
        + _FACTS
        + _KEPT
        + "このエラーを報告してください。`vsnapfs verify {VOLUME}` で確認してから、"
        + _ONLINE
    ),
    ("volsnap", 91): (
        "{the_area}のファイルを開く、ロックする、または大きさを変える操作に失敗したため、"
        "{the_volume}はオフラインになりました。" + _SIZES + "アクセス許可や属性、ファイル システム"
        "が読み取り専用でないかを確認してから、" + _ONLINE
    ),
    ("volsnap", 92): (_OFFLINE + "ブロックの退避以外の読み書きに失敗しました。" + _FACTS + _AGAIN),
    ("volsnap", 93): (
        _OFFLINE + "使用中の{the_area}がなくなりました。削除、アンマウント、または取り外しが"
        "行われています。" + _SIZES + "ボリュームをマウントしている間は回復ポイントを読み取れる"
        "ので、必要なものをエクスポートしてください。差分領域を元に戻してから、" + _ONLINE
    ),
    ("volsnap", 94): (
        "vsnapfs 以外のものが{the_area}に書き込んだため、{the_volume}はオフラインになりました。"
        + _SIZES
        + "ほかに使用しているものがないことを確かめ、`vsnapfs verify {VOLUME}` で確認して"
        "から、" + _ONLINE
    ),
    ("Microsoft-Windows-Ntfs", 140): (
        "{the_volume}へのフラッシュ[ (デバイス {device}) ]に失敗しました。上位のファイル"
        " システムのログが書き込まれておらず、直前の変更が失われたおそれがあります。"
        "[原因: {cause}。][その後{more_times}失敗しました。]ボリュームがオンラインになったら、"
        "そのファイル システムをマウントし直してください。"
    ),
    ("Microsoft-Windows-Ntfs", 98): (
        "{the_volume}のファイル システム[ ({device}) ]がマウントされました[。状態: {cause}]。"
    ),
    ("Ntfs", 57): (
        "{the_volume}へのフラッシュ[ (デバイス {device}) ]に失敗しました。上位のファイル"
        " システムのログが壊れたおそれがあります。[原因: {cause}。]"
    ),
    ("Ntfs", 50): (
        "プログラムに完了を返した書き込みが[デバイス {device} を通して]{the_volume}に届かず、"
        "そのデータは失われました。[範囲: {range}。][原因: {cause}。]"
    ),
    ("Ntfs", 137): (
        "{the_volume}のファイル システム[ ({device}) ]のトランザクション マネージャーでエラーが"
        "発生し、処理を続けられません。[原因: {cause}。]ファイル システムをマウントし直して"
        "ください。"
    ),
    ("vsnapfs", 1000): (
        "{the_volume}を作成しました。[レプリカ: {size}。|[レプリカ: {length}。]]"
        "[差分領域[ {diff_area}]: {sizes}。]"
    ),
    ("vsnapfs", 1001): (
        "{the_volume}を開きました。[マウント先: {mountpoint}。|[マウント先: {what}。]]"
        "[保持: {points_phrase}。]"
    ),
    ("vsnapfs", 1002): "{the_volume}を正常に閉じました。",
    ("vsnapfs", 1010): "{the_volume}の{the_point}を作成しました。",
    ("vsnapfs", 1011): "{the_volume}の{the_point}を削除しました。[理由: {cause}。]",
    ("vsnapfs", 1020): (
        "管理者が{the_volume}をオフラインにしました。回復ポイントは引き続き読み取れます。"
        "オンラインに戻すには `vsnapfs online {VOLUME}` を実行してください。"
    ),
    ("vsnapfs", 1021): (
        "{the_volume}はオンラインです。[オフラインの間に{more_flushes}。]オフラインになったときに"
        "使用していたループ デバイスとファイル システムは、接続とマウントをやり直す必要があり"
        "ます。"
    ),
    ("vsnapfs", 1022): (
        "管理者の指示により、{the_volume}は[{gone}|回復ポイント]を破棄し、空の差分領域"
        "[ ({diff_area}) ]から始めました。[容量: {sizes}。][原因: {cause}。]"
    ),
    ("vsnapfs", 1023): (
        "{the_volume}がオフラインの間に、Ntfs 140 として報告した 1 回のあと、"
        "[{more_flushes}|フラッシュがさらに失敗しました]。"
    ),
    ("vsnapfs", 1030): (
        "{the_volume}の{the_area}の最大サイズを[ {old} から][ {new} に]変更しました。"
        "[現在の容量: {sizes}。]"
    ),
    ("vsnapfs", 1040): (
        "{the_volume}の{the_area}に退避されたブロックのチェックサムが一致しません[ ({place})]。"
        "[影響: {points_phrase}。|[影響: 回復ポイント {point}。]][原因: {cause}。]"
        "この範囲を回復ポイントから読むとエラーになり、誤ったデータが返ることはありません。影響の全体は"
        " `vsnapfs verify {VOLUME}` で確認できます。"
    ),
    ("vsnapfs", 1041): (
        "{the_volume}の{the_area}の破損した管理構造[ ({what}) ]を、2 つ目の写しから修復しました。"
        "[原因: {cause}。]失われたものはありません。繰り返し起こる場合は、ディスクを確認してくださ"
        "い。"
    ),
    ("vsnapfs", 1042): (
        "{the_volume}は正常に閉じられていなかったため、回復処理を行いました。[最後のバリアで退避"
        "されたブロックのうち {kept} 個を保持し、完全でない {dropped} 個を破棄しました (元の内容は"
        "まだ上書きされていません)。|[完全でない写し {dropped} 個を破棄しました。]][残りのうち"
        " {copies}しており、影響は `vsnapfs verify {VOLUME}` で確認できます。]"
    ),
    ("vsnapfs", 1043): (
        "{the_volume}の書き込みバッファー[ {what} ]が失われました。[原因: {cause}。]"
        "応答済みでフラッシュされていない書き込みが失われたおそれがあります。回復ポイントには影響しません。"
    ),
    ("vsnapfs", 1044): (
        "応答済みの書き込み[ {count} 件]を反映できないまま、{the_volume}を閉じました。"
        "[原因: {cause}。]書き込みは次に開くまでメモリに残りますが、再起動すると失われます。"
    ),
    ("vsnapfs", 1045): (
        '耐久性 "process" で使用中の{the_volume}で[差分領域の同期に失敗しました (原因: {cause})。|'
        "[電源断が発生しました。]]その時点の回復ポイント"
        "[ {count} 個]は正しくないおそれがあります。"
    ),
    ("vsnapfs", 1047): (
        "{the_volume}の{the_area}の拡張に時間がかかっています。[{old} から {new} への拡張に"
        " {seconds} 秒かかりました。|[{seconds} 秒たちましたが、まだ終わっていません。]]"
        "[{writes_waited}。]領域を必要とする書き込みは拡張が終わるまで待ちます (ポリシー offline"
        " では最長で volume.toml の grow-timeout の秒数)。差分領域のあるディスクの負荷を確認して"
        "ください。"
    ),
    ("vsnapfs", 1048): (
        "{the_volume}に対する操作[ {what} ]が終了しました。開始後に要求元が切断していたため、結果は"
        "通知されていません。[操作は失敗しました: {cause}。|操作は完了しています。]"
    ),
    ("vsnapfs", 1050): (
        "{the_volume}のレプリカで[ {what} の]処理に失敗しました[ ({range})]。[原因: {cause}。]"
        "この要求は拒否されましたが、ボリュームはオンラインのままです。"
    ),
    ("vsnapfs", 1049): (
        "{the_volume}は別のボリュームのコピーです。元のボリュームの書き込みバッファー[ {what} ]には"
        "触れず、電源断の後と同じように開きます。コピーした時点で応答済みかつ未フラッシュだった書き込みは、"
        "含まれていないことがあります。"
    ),
    ("vsnapfs", 1053): (
        "{the_volume}の書き込みバッファー[ {what} ]が共有メモリから削除されました。"
        "内容はすべて反映し、新しいバッファーを作成します。この間にサーバーが強制終了されると、"
        "応答済みの書き込みが失われるおそれがあります。systemd-logind の RemoveIPC= など、"
        "/dev/shm を掃除する設定を確認してください。"
    ),
    ("vsnapfs", 1054): (
        "指定により、{the_volume}の書き込みバッファー[ {what} ]に残っていた応答済みの書き込みを"
        "破棄しました。"
        "[原因: {cause}。]回復ポイントには影響しません。"
    ),
    ("vsnapfs", 1055): (
        "{the_volume}の書き込みバッファーは、サーバーの終了とともに失われるおそれがあります。"
        "[原因: {cause}。]--write-buffer 0 を指定すると、反映前に応答することはありません。"
    ),
    ("vsnapfs", 1051): (
        "vsnapfs が扱っていない間に、{the_volume}のレプリカ[ ({device}) ]が変更されました。"
        "[詳細: {cause}。]"
        "回復ポイントに変更後の内容が現れるおそれがあります。"
    ),
    ("vsnapfs", 1052): (
        "[{the_volume}の差分領域 {diff_area} |{the_volume}のレプリカ[ ({device}) ]]が、vsnapfs 以外"
        "の何か[ ({what}) ]によって書き込み用に開かれました[ (前回の報告以降、{more_times})]。"
        "[{diff_area} にある写しが壊れたおそれがあります。`vsnapfs verify {VOLUME}` で確認して"
        "ください。|上書きされた内容があれば、退避されていないため回復ポイントから失われています。]"
    ),
    ("vsnapfs", 1060): (
        "{the_volume}のレプリカ[ ({device}) ]の同期に失敗しました。[原因: {cause}。]最後に"
        "成功した同期よりあとに書き込まれた内容は失われたおそれがあります。ボリュームを開き直すまで、フラッシュは"
        "すべて失敗します。"
    ),
    ("vsnapfs", 1090): (
        "vsnapfs で予期しないエラーが発生しました[ (ボリューム {volume})]。[処理: {what}。]"
        "[詳細: {cause}。]要求は拒否されました。[前回の報告以降、{more_times}発生して"
        "います。]このエラーを報告してください。"
    ),
    ("vsnapfs", 1091): "[{volume}: {remark}。|[{remark}。|{the_volume}を確認してください。]]",
}
